/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Translation of guest code: registers callbacks for instructions, and marks the pages that contain code. */
#include "gateway.h"

#define INSN_MAX 15

/*
 * A vCPU of this thread. Translation callbacks do not get the index of the vCPU. If one thread runs all vCPUs, any of
 * them is suitable, because only its register handles and its buffer are used.
 */
static _Thread_local struct vcpu_state *vcpu_of_thread;

/* Return false if this thread runs another vCPU, too. */
bool translation_thread(struct vcpu_state *vcpu)
{
    bool first = !vcpu_of_thread || vcpu_of_thread == vcpu;

    vcpu_of_thread = vcpu;
    return first;
}

static void *insn_pack(struct insn_info info)
{
    uintptr_t word = info.kind | (uintptr_t)info.long_mode << 3 | (uintptr_t)info.privileged << 4 |
                     (uintptr_t)info.offset << 5 | (uintptr_t)info.size << 17;
    return (void *)word;
}

struct insn_info insn_unpack(const void *userdata)
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

enum { KIND_HLT = 6, KIND_RDTSC = 7 }; /* not trapped */

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
        return !vmcall_possible; /* ignored by the other instructions, but with them 0F 01 C1 is not VMCALL */
    default:
        return byte >= 0x40 && byte <= 0x4f; /* REX; outside 64-bit code these are separate instructions */
    }
}

static unsigned int insn_kind(const uint8_t *bytes, size_t size)
{
    size_t at = 0;

    if (size == 1) {
        return bytes[0] == 0xf4 ? KIND_HLT : 0;
    }
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

/* Mark the page as containing translated code: from now on, writes to it must go through QEMU. */
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

void on_translation(struct qemu_plugin_tb *tb, void *userdata)
{
    size_t count = qemu_plugin_tb_n_insns(tb);
    uint64_t start = qemu_plugin_tb_vaddr(tb);
    struct insn_info info = { 0 };
    struct vcpu_state *vcpu = NULL;
    bool after_rdtsc = clock_follows_rdtsc(start);
    uint64_t base = 0, last = start;
    (void)userdata;

    if (vcpu_of_thread) {
        resets_translation(vcpu_of_thread, tb, start);
    }
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        size_t size = qemu_plugin_insn_size(insn);
        uint64_t vaddr = qemu_plugin_insn_vaddr(insn);
        uint8_t bytes[INSN_MAX] = { 0 };

        last = vaddr + (size ? size - 1 : 0);
        if (after_rdtsc) {
            qemu_plugin_register_vcpu_insn_exec_cond_cb(insn, clock_after_rdtsc, QEMU_PLUGIN_CB_R_REGS,
                                                        QEMU_PLUGIN_COND_NE, gateway.sampling, 0, NULL);
        }
        after_rdtsc = false;
        if (!size || size > INSN_MAX || qemu_plugin_insn_data(insn, bytes, size) != size) {
            continue;
        }
        unsigned int kind = insn_kind(bytes, size);
        if (kind == KIND_RDTSC) {
            qemu_plugin_register_vcpu_insn_exec_cond_cb(insn, clock_before_rdtsc, QEMU_PLUGIN_CB_NO_REGS,
                                                        QEMU_PLUGIN_COND_NE, gateway.sampling, 0, NULL);
            clock_note_rdtsc(vaddr + size);
            after_rdtsc = true;
        } else if (kind) {
            if (!vcpu) {
                vcpu = vcpu_of_thread;
                if (!vcpu) {
                    return;
                }
                /* During translation all registers are those of the start of the block. */
                base = start - register_read(vcpu, GUEST_RIP);
                info.long_mode = registers_long_mode(vcpu);
                info.privileged = registers_privileged(vcpu);
            }
            if (kind == KIND_HLT) {
                if (info.privileged) {
                    qemu_plugin_register_vcpu_insn_exec_cb(insn, on_halt, QEMU_PLUGIN_CB_NO_REGS, NULL);
                }
                continue;
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

