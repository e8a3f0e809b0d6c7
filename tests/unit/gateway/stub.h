/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A stand-in for QEMU's side of the plug-in interface: as much of it as the gateway calls. */
#ifndef STUB_H
#define STUB_H

#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "plugin_api.h"

enum {
    STUB_RAX, STUB_RBX, STUB_RCX, STUB_RDX, STUB_RSI, STUB_RDI, STUB_R8, STUB_R15, STUB_RSP,
    STUB_RIP, STUB_EFLAGS, STUB_CS, STUB_CR0, STUB_REGISTERS
};

#define STUB_VCPUS 64
#define STUB_INSNS 64
#define STUB_RAM_START UINT64_C(0x100000)
#define STUB_RAM_SIZE UINT64_C(0x4000)

struct stub_vcpu {
    uint64_t registers[STUB_REGISTERS];
    bool long_mode;
    jmp_buf way_out; /* taken by qemu_plugin_set_pc */
    uint32_t in_service[8];
    _Atomic uint32_t requested[8]; /* interrupts that wait in the local APIC */
    unsigned int raised; /* interrupts that the gateway has written to the local APIC */
    bool deaf; /* MSIs do not reach it */
    bool x2apic; /* the APIC's memory page reads as all ones */
    uint64_t sampling; /* the scoreboard's word */
};

struct qemu_plugin_insn {
    uint64_t vaddr;
    size_t size;
    uint8_t bytes[16];
    qemu_plugin_vcpu_udata_cb_t callback;
    void *userdata;
    enum qemu_plugin_cb_flags flags;
    qemu_plugin_vcpu_udata_cb_t conditional[2];
    int conditionals;
};

struct qemu_plugin_tb {
    uint64_t vaddr;
    size_t count;
    qemu_plugin_vcpu_udata_cb_t callback; /* before the block */
    struct qemu_plugin_insn insns[STUB_INSNS];
};

extern struct stub_vcpu stub_vcpus[STUB_VCPUS];
extern uint8_t stub_ram[STUB_RAM_SIZE];
extern _Thread_local struct stub_vcpu *stub_current;

extern qemu_plugin_vcpu_udata_cb_t stub_on_vcpu, stub_on_resume;
extern qemu_plugin_vcpu_tb_trans_cb_t stub_on_translation;
extern qemu_plugin_vcpu_discon_cb_t stub_on_discontinuity;
extern qemu_plugin_udata_cb_t stub_on_exit;

void stub_interrupt(struct stub_vcpu *vcpu, uint32_t vector);
void stub_add_insn(struct qemu_plugin_tb *tb, const uint8_t *bytes, size_t size);

#endif
