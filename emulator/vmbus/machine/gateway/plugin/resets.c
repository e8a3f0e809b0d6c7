/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Counts resets of the machine. The plug-in interface has no callback for them; but after a reset, and hardly ever
 * otherwise (docs/gateway.md), a vCPU is in real mode, its CS has the base 0xFFFF0000, and it executes 0xFFFFFFF0. This
 * is the first vCPU: the others wait for a start-up IPI, and begin elsewhere.
 */
#include "gateway.h"

#define RESET_VECTOR UINT64_C(0xfffffff0) /* linear address */
#define RESET_IP UINT64_C(0xfff0)

/* Called before a block at the reset vector is executed. */
void on_reset(unsigned int index, void *userdata)
{
    (void)index;
    (void)userdata;
    atomic_fetch_add(&gateway.control->resets, 1);
}

/*
 * Called when the block at the linear address `start` is translated. During translation all registers are those of the
 * start of the block, and QEMU looks blocks up by the base of CS and the mode, among others.
 */
void resets_translation(struct vcpu_state *vcpu, struct qemu_plugin_tb *tb, uint64_t start)
{
    if (start == RESET_VECTOR && register_read(vcpu, GUEST_RIP) == RESET_IP && registers_real_mode(vcpu)) {
        qemu_plugin_register_vcpu_tb_exec_cb(tb, on_reset, QEMU_PLUGIN_CB_NO_REGS, NULL);
    }
}
