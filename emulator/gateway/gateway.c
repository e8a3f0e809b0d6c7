/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Trap gateway: a TCG plug-in that hands CPUID, RDMSR, WRMSR and VMCALL of a guest to an emulator process.
 *
 * It knows these instructions and nothing of VMBus. What it can it answers from tables that the emulator has
 * handed over (CPUID leaves, doorbells); all else becomes a request in shared memory (slots.c), and the vCPU runs
 * the instruction again until the answer is there. docs/gateway.md describes the protocol, shared.h the layout.
 *
 *      gateway.c    loading, translation of guest code, the four instructions, interrupts
 *      slots.c      requests and their answers
 *      tables.c     look-ups in what the emulator handed over
 *      clock.c      guest TSC against host TSC
 *      registers.c  guest registers
 *      listener.c   the socket that an emulator attaches to
 *      memory.c     the shared region
 */
#include "gateway.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CPUID_FIRST 0x40000000u
#define CPUID_LAST 0x400000ffu
#define MSR_FIRST 0x40000000u
#define MSR_LAST 0x400001ffu
/* In the range of the local APIC's MSRs, and reserved: TCG raises #GP for it, whatever the CPU model. */
#define MSR_THAT_FAULTS 0x8ffu

#define APIC_EOI UINT64_C(0xfee000b0)
#define APIC_ISR UINT64_C(0xfee00100)

#define INSN_MAX 15
#define PAGE_SHIFT 12
#define PAGE_MASK UINT64_C(0xfff)
#define DEFAULT_CODE_PAGES (UINT64_C(1) << (40 - PAGE_SHIFT)) /* 1 TiB */

PLUGIN_EXPORT int qemu_plugin_version = PLUGIN_API_VERSION;

struct gateway gateway = {
    .wait = true,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .clock_lock = PTHREAD_MUTEX_INITIALIZER,
};

/*
 * What is known of an instruction when it is translated, packed into its callback's user data. All of it is part
 * of what QEMU finds a block by (the code segment's base, its size, the privilege level), or of the page offset.
 *
 * The program counter is not: blocks are shared between virtual addresses, and the one that can be read in a
 * callback is that of the block's start, or of an earlier instruction of the block. As the block lies in one page
 * but for the end of its last instruction, the low bits say how far it is from there to the instruction.
 */
struct insn_info {
    unsigned int kind;   /* enum gateway_kind */
    bool long_mode;      /* 64-bit code */
    bool privileged;     /* privilege level 0 */
    unsigned int offset; /* low 12 bits of the program counter (not of the linear address) */
    unsigned int size;
};

static void *insn_pack(struct insn_info info)
{
    uintptr_t word = info.kind | (uintptr_t)info.long_mode << 3 | (uintptr_t)info.privileged << 4 |
                     (uintptr_t)info.offset << 5 | (uintptr_t)info.size << 17;
    return (void *)word;
}

static struct insn_info insn_unpack(const void *userdata)
{
    uintptr_t word = (uintptr_t)userdata;
    return (struct insn_info){
        .kind = word & 7,
        .long_mode = word >> 3 & 1,
        .privileged = word >> 4 & 1,
        .offset = word >> 5 & PAGE_MASK,
        .size = word >> 17 & 15,
    };
}

static uint64_t insn_pc(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t pc = register_read(vcpu, GUEST_RIP);
    return pc + ((info.offset - pc) & PAGE_MASK);
}

static bool emulator_was_active(void)
{
    return atomic_load_explicit(&gateway.control->was_active, memory_order_acquire);
}

/* ---- the four instructions; returning from a callback runs the instruction natively ---- */

/* Go on behind the instruction. Does not return. */
static void step_over(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t next = insn_pc(vcpu, info) + info.size;
    qemu_plugin_set_pc(info.long_mode ? next : next & UINT32_MAX);
}

/* Run the instruction anew, after QEMU has looked for other work. Does not return. */
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
 * Let the instruction fault by itself. VMCALL is #UD under TCG. An MSR instruction gets the number of an MSR that
 * faults; the discontinuity callback puts RCX back before the guest's handler runs.
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

static bool ring_doorbell(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t control, input, result;
    uint32_t doorbell;

    if (info.long_mode) {
        control = register_read(vcpu, GUEST_RCX);
        input = register_read(vcpu, GUEST_RDX);
    } else {
        control = register_read(vcpu, GUEST_RDX) << 32 | (uint32_t)register_read(vcpu, GUEST_RAX);
        input = register_read(vcpu, GUEST_RBX) << 32 | (uint32_t)register_read(vcpu, GUEST_RCX);
    }
    if (!tables_doorbell(control, input, &doorbell, &result)) {
        return false;
    }
    vcpu->shared->doorbells++;
    __atomic_store_n(&gateway.doorbells[doorbell], 1, __ATOMIC_RELEASE);
    emulator_wake();
    give_result(vcpu, info, result);
    return true;
}

static void trap_request(struct vcpu_state *vcpu, struct insn_info info)
{
    uint64_t value = 0;

    if (info.kind != KIND_VMCALL) {
        uint32_t msr = (uint32_t)register_read(vcpu, GUEST_RCX);
        if (msr < MSR_FIRST || msr > MSR_LAST) {
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
    clock_arm((unsigned int)(vcpu - gateway.vcpus), vcpu);
    if (info.kind == KIND_VMCALL && ring_doorbell(vcpu, info)) {
        step_over(vcpu, info);
    }
    clock_refresh(false);
    struct trap_key key = {
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

static void on_trap(unsigned int index, void *userdata)
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

/* ---- translation ---- */

/*
 * A vCPU of this thread. Translation callbacks are not told which one runs; with one thread for all of them any
 * will do, since only its register handles and its buffer are used.
 */
static _Thread_local struct vcpu_state *vcpu_of_thread;

enum { KIND_RDTSC = 7 }; /* not trapped: the instruction behind it is looked at */

static bool is_prefix(uint8_t byte, bool vmcall_possible)
{
    switch (byte) {
    case 0x26:
    case 0x2e:
    case 0x36:
    case 0x3e:
    case 0x64:
    case 0x65:
    case 0x67:
        return true;
    case 0x66:
    case 0xf2:
    case 0xf3:
        return !vmcall_possible; /* ignored by the others, but they make another instruction of 0F 01 C1 */
    default:
        return byte >= 0x40 && byte <= 0x4f; /* REX: in other code an instruction of its own, so never here */
    }
}

static unsigned int insn_kind(const uint8_t *bytes, size_t size)
{
    size_t at = 0;

    while (at < size && bytes[at] != 0x0f) {
        if (!is_prefix(bytes[at], false)) {
            return 0;
        }
        at++;
    }
    if (size - at == 2) {
        switch (bytes[at + 1]) {
        case 0xa2:
            return KIND_CPUID;
        case 0x32:
            return KIND_RDMSR;
        case 0x30:
            return KIND_WRMSR;
        case 0x31:
            return KIND_RDTSC;
        default:
            return 0;
        }
    }
    if (size - at == 3 && bytes[at + 1] == 0x01) {
        if (bytes[at + 2] == 0xf9) {
            return KIND_RDTSC; /* RDTSCP */
        }
        for (size_t i = 0; i < at; i++) {
            if (!is_prefix(bytes[i], true)) {
                return 0;
            }
        }
        /* VMCALL, and AMD's VMMCALL */
        return bytes[at + 2] == 0xc1 || bytes[at + 2] == 0xd9 ? KIND_VMCALL : 0;
    }
    return 0;
}

/* The page holds translated code from now on: who writes it has to go through QEMU. */
static void mark_code(uint64_t vaddr)
{
    uint64_t address;

    if (qemu_plugin_translate_vaddr(vaddr, &address) && address >> PAGE_SHIFT < gateway.code_pages) {
        uint8_t *page = &gateway.code[address >> PAGE_SHIFT];
        if (!__atomic_load_n(page, __ATOMIC_RELAXED)) {
            __atomic_store_n(page, 1, __ATOMIC_SEQ_CST);
        }
    }
}

static void on_translation(struct qemu_plugin_tb *tb, void *userdata)
{
    size_t count = qemu_plugin_tb_n_insns(tb);
    uint64_t start = qemu_plugin_tb_vaddr(tb);
    struct insn_info info = { 0 };
    struct vcpu_state *vcpu = NULL;
    bool after_rdtsc = false;
    uint64_t base = 0, last = start;
    (void)userdata;

    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        size_t size = qemu_plugin_insn_size(insn);
        uint64_t vaddr = qemu_plugin_insn_vaddr(insn);
        uint8_t bytes[INSN_MAX] = { 0 };

        last = vaddr + (size ? size - 1 : 0);
        if (after_rdtsc) {
            qemu_plugin_register_vcpu_insn_exec_cond_cb(insn, clock_sample, QEMU_PLUGIN_CB_R_REGS,
                                                        QEMU_PLUGIN_COND_NE, gateway.sampling, 0, NULL);
        }
        after_rdtsc = false;
        if (size < 2 || size > INSN_MAX || qemu_plugin_insn_data(insn, bytes, size) != size) {
            continue;
        }
        unsigned int kind = insn_kind(bytes, size);
        if (kind == KIND_RDTSC) {
            after_rdtsc = true;
        } else if (kind) {
            if (!vcpu) {
                vcpu = vcpu_of_thread;
                if (!vcpu) {
                    return;
                }
                /* In this moment all registers are those of the start of the block. */
                base = start - register_read(vcpu, GUEST_RIP);
                info.long_mode = registers_long_mode(vcpu);
                info.privileged = registers_privileged(vcpu);
            }
            info.kind = kind;
            info.offset = (unsigned int)((vaddr - base) & PAGE_MASK);
            info.size = (unsigned int)size;
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_trap, QEMU_PLUGIN_CB_RW_REGS_PC, insn_pack(info));
        }
    }
    if (count) {
        mark_code(start);
        if ((start ^ last) >> PAGE_SHIFT) {
            mark_code(last);
        }
    }
}

/* ---- interrupts and exceptions ---- */

static uint32_t apic_read(struct vcpu_state *vcpu, uint64_t address)
{
    uint32_t value = 0;

    g_byte_array_set_size(vcpu->buffer, sizeof(value));
    if (qemu_plugin_read_memory_hwaddr(address, vcpu->buffer, sizeof(value)) == QEMU_PLUGIN_HWADDR_OPERATION_OK) {
        memcpy(&value, vcpu->buffer->data, sizeof(value));
    }
    return value;
}

/* End the interrupt that was just delivered, if the guest relies on the hypervisor for that. */
static void end_interrupt(struct vcpu_state *vcpu, const uint64_t *vectors)
{
    for (int word = 7; word >= 0; word--) {
        uint32_t in_service = apic_read(vcpu, APIC_ISR + 0x10 * (uint64_t)word);
        if (in_service) {
            int vector = word * 32 + 31 - __builtin_clz(in_service);
            if (vectors[vector / 64] >> (vector % 64) & 1) {
                g_byte_array_set_size(vcpu->buffer, 4);
                memset(vcpu->buffer->data, 0, 4);
                qemu_plugin_write_memory_hwaddr(APIC_EOI, vcpu->buffer);
                vcpu->shared->auto_eois++;
            }
            return;
        }
    }
}

static void on_discontinuity(unsigned int index, enum qemu_plugin_discon_type type, uint64_t from_pc,
                             uint64_t to_pc, void *userdata)
{
    (void)to_pc;
    (void)userdata;
    if (index >= gateway.vcpus_max || !gateway.vcpus[index].ready) {
        return;
    }
    struct vcpu_state *vcpu = &gateway.vcpus[index];
    if (type == QEMU_PLUGIN_DISCON_EXCEPTION) {
        if (vcpu->fault_pending) {
            vcpu->fault_pending = false;
            if (from_pc == vcpu->fault_pc) {
                register_write(vcpu, GUEST_RCX, vcpu->fault_rcx);
            }
        }
        return;
    }
    clock_arm(index, vcpu);
    uint64_t vectors[4], any = 0;
    for (int i = 0; i < 4; i++) {
        vectors[i] = atomic_load_explicit(&vcpu->shared->auto_eoi[i], memory_order_relaxed);
        any |= vectors[i];
    }
    if (any) {
        end_interrupt(vcpu, vectors);
    }
}

static void on_resume(unsigned int index, void *userdata)
{
    (void)userdata;
    if (index < gateway.vcpus_max && gateway.vcpus[index].ready) {
        clock_arm(index, &gateway.vcpus[index]);
    }
}

/* ---- loading ---- */

static void on_vcpu(unsigned int index, void *userdata)
{
    (void)userdata;
    if (index >= gateway.vcpus_max) {
        fprintf(stderr, "vmbus gateway: vCPU %u is beyond the %u announced\n", index, gateway.vcpus_max);
        return;
    }
    struct vcpu_state *vcpu = &gateway.vcpus[index];
    if (!vcpu->buffer) {
        vcpu->buffer = g_byte_array_new();
    }
    vcpu->shared = (struct gateway_vcpu *)(gateway.region + gateway.control->vcpu_offset) + index;
    vcpu->requests = (_Atomic uint64_t *)(gateway.region + gateway.control->request_offset) +
                     (size_t)index * GATEWAY_SLOTS;
    if (!registers_find(vcpu)) {
        exit(1);
    }
    vcpu->shared->present = 1;
    vcpu->ready = true;
    vcpu_of_thread = vcpu;
    uint32_t seen = atomic_load(&gateway.control->vcpus);
    while (seen <= index && !atomic_compare_exchange_weak(&gateway.control->vcpus, &seen, index + 1)) {
    }
}

static void on_exit_of_qemu(void *userdata)
{
    (void)userdata;
    listener_unlink();
}

static bool parse_arguments(int argc, char **argv, uint64_t *code_pages)
{
    for (int i = 0; i < argc; i++) {
        const char *value = strchr(argv[i], '=');
        size_t length = value ? (size_t)(value - argv[i]) : strlen(argv[i]);

        value = value ? value + 1 : "";
        if (length == 6 && strncmp(argv[i], "socket", length) == 0 && *value) {
            gateway.socket_path = value;
        } else if (length == 4 && strncmp(argv[i], "wait", length) == 0 &&
                   (strcmp(value, "on") == 0 || strcmp(value, "off") == 0)) {
            gateway.wait = strcmp(value, "on") == 0;
        } else if (length == 9 && strncmp(argv[i], "ram-limit", length) == 0) {
            char *end;
            unsigned long gigabytes = strtoul(value, &end, 10);
            if (*end || !gigabytes || gigabytes > 65536) {
                fprintf(stderr, "vmbus gateway: ram-limit is a number of GiB from 1 to 65536\n");
                return false;
            }
            *code_pages = (uint64_t)gigabytes << (30 - PAGE_SHIFT);
        } else {
            fprintf(stderr, "vmbus gateway: unknown argument %s (socket=PATH, wait=on|off, ram-limit=GiB)\n",
                    argv[i]);
            return false;
        }
    }
    if (!gateway.socket_path) {
        fprintf(stderr, "vmbus gateway: the argument socket=PATH is missing\n");
        return false;
    }
    return true;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    uint64_t code_pages = DEFAULT_CODE_PAGES;

    if (info->version.min > PLUGIN_API_VERSION || info->version.cur < PLUGIN_API_VERSION) {
        fprintf(stderr, "vmbus gateway: built for plug-in interface %d, this QEMU has %d to %d\n",
                PLUGIN_API_VERSION, info->version.min, info->version.cur);
        return 1;
    }
    if (!info->system_emulation || strcmp(info->target_name, "x86_64") != 0) {
        fprintf(stderr, "vmbus gateway: only for qemu-system-x86_64\n");
        return 1;
    }
    if (!parse_arguments(argc, argv, &code_pages)) {
        return 1;
    }
    gateway.vcpus_max = (unsigned int)info->system.max_vcpus;
    gateway.vcpus = calloc(gateway.vcpus_max, sizeof(*gateway.vcpus));
    if (!gateway.vcpus || !memory_create(gateway.vcpus_max, code_pages)) {
        return 1;
    }
    clock_start();
    gateway.sampling = (qemu_plugin_u64){ .score = qemu_plugin_scoreboard_new(sizeof(uint64_t)) };
    if (!listener_start()) {
        return 1;
    }
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu, NULL);
    qemu_plugin_register_vcpu_resume_cb(id, on_resume, NULL);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, NULL);
    qemu_plugin_register_vcpu_discon_cb(id, QEMU_PLUGIN_DISCON_INTERRUPT | QEMU_PLUGIN_DISCON_EXCEPTION,
                                        on_discontinuity, NULL);
    qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
    return 0;
}
