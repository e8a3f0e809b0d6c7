/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Callbacks before CPUID, RDMSR, WRMSR and VMCALL. If a callback returns, the instruction runs natively; step_over()
 * and run_again() do not return.
 */
#include "gateway.h"

#define CPUID_FIRST 0x40000000u
#define CPUID_LAST 0x400000ffu
#define MSR_FIRST 0x40000000u
#define MSR_LAST 0x400001ffu
#define APIC_MSR_FIRST 0x6e0u /* TSC deadline; then x2APIC, 0x800 to 0x8ff */
#define APIC_MSR_LAST 0x8ffu
/* In the range of the local APIC's MSRs, and reserved: TCG raises #GP for it, whatever the CPU model. */
#define MSR_THAT_FAULTS 0x8ffu

static uint64_t insn_pc(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t pc = register_read(vcpu, GUEST_RIP);
    return pc + ((info.offset - pc) & PAGE_MASK);
}

static bool emulator_was_active(void)
{
    return atomic_load_explicit(&gateway.control->was_active, memory_order_acquire);
}

/* Continue after the instruction. Does not return. */
static void step_over(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t next = insn_pc(vcpu, info) + info.size;
    qemu_plugin_set_pc(info.long_mode ? next : next & UINT32_MAX);
}

/* Execute the instruction again, after QEMU has handled pending work. Does not return. */
static void run_again(struct vcpu_state *vcpu, struct insn_info info)
{
    qemu_plugin_set_pc(insn_pc(vcpu, info));
}

static void give_result(struct vcpu_state *vcpu, struct insn_info info, uint64_t value)
{
    if (info.kind == KIND_VMCALL && info.long_mode) {
        register_write(vcpu, GUEST_RAX, value);
    } else if (info.kind != KIND_WRMSR) {
        register_write(vcpu, GUEST_RAX, value & UINT32_MAX);
        register_write(vcpu, GUEST_RDX, value >> 32);
    }
}

/*
 * Make the instruction fault natively. VMCALL raises #UD under TCG. An MSR instruction gets the number of an MSR that
 * raises #GP; the discontinuity callback restores RCX before the guest's handler runs.
 */
static void give_fault(struct vcpu_state *vcpu, struct insn_info info)
{
    vcpu->shared->faults++;
    if (info.kind == KIND_RDMSR || info.kind == KIND_WRMSR) {
        vcpu->fault_pc = insn_pc(vcpu, info);
        vcpu->fault_rcx = register_read(vcpu, GUEST_RCX);
        vcpu->fault_pending = true;
        register_write(vcpu, GUEST_RCX, MSR_THAT_FAULTS);
    }
}

static void trap_cpuid(struct vcpu_state *vcpu, struct insn_info info)
{
    uint32_t leaf = (uint32_t)register_read(vcpu, GUEST_RAX);
    struct gateway_cpuid found;

    if (leaf < CPUID_FIRST || leaf > CPUID_LAST) {
        return;
    }
    if (!emulator_was_active()) {
        if (gateway.wait) {
            emulator_rest();
            run_again(vcpu, info);
        }
        return;
    }
    if (!tables_cpuid(leaf, &found)) {
        run_again(vcpu, info);
    }
    register_write(vcpu, GUEST_RAX, found.eax);
    register_write(vcpu, GUEST_RBX, found.ebx);
    register_write(vcpu, GUEST_RCX, found.ecx);
    register_write(vcpu, GUEST_RDX, found.edx);
    step_over(vcpu, info);
}

static struct trap_key key_of(struct vcpu_state *vcpu, struct insn_info info)
{
    return (struct trap_key){
        .kind = info.kind,
        .pc = insn_pc(vcpu, info),
        .rax = register_read(vcpu, GUEST_RAX),
        .rbx = register_read(vcpu, GUEST_RBX),
        .rcx = register_read(vcpu, GUEST_RCX),
        .rdx = register_read(vcpu, GUEST_RDX),
        .rsi = register_read(vcpu, GUEST_RSI),
        .rdi = register_read(vcpu, GUEST_RDI),
        .r8 = register_read(vcpu, GUEST_R8),
        .rsp = register_read(vcpu, GUEST_RSP),
    };
}

/* Post a trap whose result is certain, unless it is a request already: that would do it twice. */
static bool post(struct vcpu_state *vcpu, struct insn_info info, uint64_t control, uint64_t input)
{
    if (slots_in_use(vcpu)) {
        struct trap_key key = key_of(vcpu, info);
        if (slots_repeated(vcpu, &key)) {
            return false;
        }
    }
    if (info.kind == KIND_WRMSR) {
        return posts_msr(vcpu, (uint32_t)register_read(vcpu, GUEST_RCX));
    }
    if (!posts_message(vcpu, control, input)) {
        return false;
    }
    give_result(vcpu, info, 0);
    return true;
}

static bool ring_doorbell(struct vcpu_state *vcpu, struct insn_info info, uint64_t control, uint64_t input)
{
    uint64_t result;
    uint32_t doorbell;

    if (!tables_doorbell(control, input, &doorbell, &result)) {
        return false;
    }
    vcpu->shared->doorbells++;
    if (__atomic_fetch_or(&gateway.doorbells[doorbell], DOORBELL_RUNG, __ATOMIC_SEQ_CST) & DOORBELL_ENGINE) {
        engine_wake();
    } else {
        emulator_wake();
    }
    give_result(vcpu, info, result);
    return true;
}

/* Complete a VMCALL that the emulator handles later. */
static bool complete_vmcall(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t control, input;

    if (info.long_mode) {
        control = register_read(vcpu, GUEST_RCX);
        input = register_read(vcpu, GUEST_RDX);
    } else {
        control = register_read(vcpu, GUEST_RDX) << 32 | (uint32_t)register_read(vcpu, GUEST_RAX);
        input = register_read(vcpu, GUEST_RBX) << 32 | (uint32_t)register_read(vcpu, GUEST_RCX);
    }
    return ring_doorbell(vcpu, info, control, input) || post(vcpu, info, control, input);
}

static void trap_request(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t value = 0;

    if (info.kind != KIND_VMCALL) {
        uint32_t msr = (uint32_t)register_read(vcpu, GUEST_RCX);
        if (msr < MSR_FIRST || msr > MSR_LAST) {
            if (info.kind == KIND_WRMSR && info.privileged && msr >= APIC_MSR_FIRST && msr <= APIC_MSR_LAST) {
                apic_wrmsr(vcpu, msr, register_read(vcpu, GUEST_RDX) << 32 | (uint32_t)register_read(vcpu, GUEST_RAX));
            }
            return;
        }
    }
    if (!info.privileged) {
        return;
    }
    if (!emulator_was_active()) {
        if (gateway.wait) {
            emulator_rest();
            run_again(vcpu, info);
        }
        return;
    }
    unsigned int index = (unsigned int)(vcpu - gateway.vcpus);
    clock_arm(index, vcpu);
    if (info.kind == KIND_RDMSR && tables_msr((uint32_t)register_read(vcpu, GUEST_RCX), index, &value)) {
        give_result(vcpu, info, value);
        step_over(vcpu, info);
    }
    if (info.kind == KIND_VMCALL && complete_vmcall(vcpu, info)) {
        step_over(vcpu, info);
    }
    if (info.kind == KIND_WRMSR && post(vcpu, info, 0, 0)) {
        step_over(vcpu, info);
    }
    clock_refresh(false);
    struct trap_key key = key_of(vcpu, info);
    switch (slots_ask(vcpu, &key, info.long_mode, &value)) {
    case OUTCOME_VALUE:
        give_result(vcpu, info, value);
        step_over(vcpu, info);
        break;
    case OUTCOME_FAULT:
        give_fault(vcpu, info);
        break;
    case OUTCOME_RETRY:
        run_again(vcpu, info);
        break;
    }
}

void on_trap(unsigned int index, void *userdata)
{
    struct insn_info info = insn_unpack(userdata);

    if (index >= gateway.vcpus_max || !gateway.vcpus[index].ready) {
        return;
    }
    struct vcpu_state *vcpu = &gateway.vcpus[index];
    if (info.kind == KIND_CPUID) {
        trap_cpuid(vcpu, info);
    } else {
        trap_request(vcpu, info);
    }
}

