/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Actions when the guest was interrupted or has faulted, before its handler runs. */
#include "gateway.h"

#include <string.h>

#define APIC_EOI UINT64_C(0xfee000b0)
#define APIC_ISR UINT64_C(0xfee00100)

/*
 * Write EOI for the interrupt that was just delivered, if its vector is in the auto-EOI bitmap. If the local APIC
 * does not respond, tell the emulator, because the guest may now hang.
 */
static void end_interrupt(struct vcpu_state *vcpu, const uint64_t *vectors)
{
    for (int word = 7; word >= 0; word--) {
        uint32_t in_service = 0;
        if (!apic_read(vcpu, APIC_ISR + 0x10 * (uint64_t)word, &in_service)) {
            vcpu->shared->auto_eoi_failures++;
            emulator_wake();
            return;
        }
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

void on_discontinuity(unsigned int index, enum qemu_plugin_discon_type type, uint64_t from_pc,
                             uint64_t to_pc, void *userdata)
{
    (void)to_pc;
    (void)userdata;
    if (index >= gateway.vcpus_max || !gateway.vcpus[index].ready) {
        return;
    }
    struct vcpu_state *vcpu = &gateway.vcpus[index];
    vcpu->tsc_before = 0;
    if (type == QEMU_PLUGIN_DISCON_EXCEPTION) {
        if (vcpu->fault_pending) {
            vcpu->fault_pending = false;
            if (from_pc == vcpu->fault_pc) {
                register_write(vcpu, GUEST_RCX, vcpu->fault_rcx);
            }
        }
        return;
    }
    idle_ended(vcpu);
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
