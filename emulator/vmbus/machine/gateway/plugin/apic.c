/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The local APIC of a vCPU, from its own thread: through its memory page in xAPIC mode, and by what the guest writes
 * to its MSRs in x2APIC mode, in which the page does not respond and a plug-in cannot read an MSR.
 */
#include "gateway.h"

#include <string.h>

#define APIC_IRR UINT64_C(0xfee00200)
#define MSI_BASE UINT64_C(0xfee00000)
#define MSI_ID_MASK UINT64_C(0xff000)

#define MSR_TSC_DEADLINE 0x6e0u
#define MSR_ICR 0x830u
#define MSR_TIMER_LVT 0x832u
#define MSR_TIMER_COUNT 0x838u
#define MSR_TIMER_DIVIDE 0x83eu

#define LVT_MASKED (1u << 16)
#define LVT_PERIODIC (1u << 17)
#define ICR_LOGICAL (1u << 11)
#define ICR_SHORTHAND (3u << 18)

/* Return false where no local APIC responds: the read fails or, in x2APIC mode, gives all ones (measured). */
bool apic_read(struct vcpu_state *vcpu, uint64_t address, uint32_t *value)
{
    g_byte_array_set_size(vcpu->buffer, sizeof(*value));
    if (qemu_plugin_read_memory_hwaddr(address, vcpu->buffer, sizeof(*value)) != QEMU_PLUGIN_HWADDR_OPERATION_OK) {
        return false;
    }
    memcpy(value, vcpu->buffer->data, sizeof(*value));
    return *value != UINT32_MAX; /* 32 vectors are never in service together: there are 16 a priority class */
}

/* Return whether the emulator has said where this vCPU takes interrupts. */
bool apic_reachable(const struct vcpu_state *vcpu)
{
    return (vcpu->shared->msi_address & ~MSI_ID_MASK) == MSI_BASE;
}

/* Raise an edge-triggered interrupt at this vCPU, as a device does with an MSI: this works in both modes. */
bool apic_raise(struct vcpu_state *vcpu, uint32_t vector)
{
    g_byte_array_set_size(vcpu->buffer, sizeof(vector));
    memcpy(vcpu->buffer->data, &vector, sizeof(vector));
    return qemu_plugin_write_memory_hwaddr(vcpu->shared->msi_address, vcpu->buffer) ==
           QEMU_PLUGIN_HWADDR_OPERATION_OK;
}

/*
 * Return whether an interrupt waits in the local APIC. The first vectors are exceptions, so one register is left out.
 * In x2APIC mode it is not known, and the answer is no.
 */
bool apic_requests(struct vcpu_state *vcpu)
{
    for (uint64_t word = 7; word >= 1; word--) {
        uint32_t requested = 0;
        if (!apic_read(vcpu, APIC_IRR + 0x10 * word, &requested)) {
            return false;
        }
        if (requested) {
            return true;
        }
    }
    return false;
}

static void start_timer(struct vcpu_state *vcpu)
{
    struct apic_timer *timer = &vcpu->timer;
    uint64_t length = (uint64_t)timer->count << timer->shift;

    timer->due_ns = !timer->count || timer->lvt & LVT_MASKED ? 0 : clock_ns() + length;
    timer->period_ns = timer->lvt & LVT_PERIODIC ? length : 0;
}

/* Note which vCPUs an interrupt between processors goes to, before it is sent. */
static void note_ipi(uint64_t value)
{
    bool one = !(value & (ICR_LOGICAL | ICR_SHORTHAND));
    uint64_t address = MSI_BASE | (value >> 32 & 0xff) << 12;

    for (unsigned int i = 0; i < gateway.vcpus_max; i++) {
        struct vcpu_state *vcpu = &gateway.vcpus[i];
        if (vcpu->shared && (!one || vcpu->shared->msi_address == address)) {
            atomic_fetch_add_explicit(&vcpu->ipis, 1, memory_order_relaxed);
        }
    }
}

/* Called before a WRMSR that is executed natively. The timer counts nanoseconds: QEMU's APIC bus runs at 1 GHz. */
void apic_wrmsr(struct vcpu_state *vcpu, uint32_t msr, uint64_t value)
{
    struct apic_timer *timer = &vcpu->timer;

    switch (msr) {
    case MSR_ICR:
        note_ipi(value);
        break;
    case MSR_TIMER_LVT:
        timer->lvt = (uint32_t)value;
        if (timer->lvt & LVT_MASKED) {
            timer->due_ns = 0;
        }
        break;
    case MSR_TIMER_DIVIDE:
        timer->shift = (((value & 3) | (value >> 1 & 4)) + 1) & 7;
        break;
    case MSR_TIMER_COUNT:
        timer->count = (uint32_t)value;
        start_timer(vcpu);
        break;
    case MSR_TSC_DEADLINE:
        timer->due_ns = value != 0; /* in the past: when it really is due, is not worked out */
        timer->period_ns = 0;
        break;
    default:
        break;
    }
}

/* Return when the timer fires next, at `now` or later; 0: not known, or not at all. */
uint64_t apic_timer_due(struct vcpu_state *vcpu, uint64_t now)
{
    struct apic_timer *timer = &vcpu->timer;

    if (timer->period_ns && timer->due_ns && timer->due_ns < now) {
        timer->due_ns += (now - timer->due_ns + timer->period_ns - 1) / timer->period_ns * timer->period_ns;
    }
    return timer->due_ns;
}

/* An interrupt was delivered: a timer that was due before is taken for its source. */
void apic_timer_fired(struct vcpu_state *vcpu, uint64_t now)
{
    struct apic_timer *timer = &vcpu->timer;

    if (!timer->period_ns && timer->due_ns <= now) {
        timer->due_ns = 0;
    }
}
