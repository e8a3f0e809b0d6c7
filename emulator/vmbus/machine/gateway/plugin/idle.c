/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * HLT: a vCPU raises the interrupts that the emulator left in `pending`, and polls for them before it halts.
 *
 * An interrupt through QEMU's main loop takes two wake-ups, of the main loop and of the vCPU. A vCPU that polls raises it
 * in its own thread, within nanoseconds. No interrupt is lost, because of the order of two stores and two loads:
 *
 *      vCPU      idle = POLLING; look at `pending` for a while;
 *                idle = HALTED;  FENCE; take `pending`, raise; HLT
 *      emulator  set a bit of `pending` (a fence); load idle
 *                POLLING: done. Otherwise: take the bit back; if it was still there, interrupt through QEMU
 *
 * If the emulator loads POLLING, HALTED was not visible yet, so the vCPU's last look comes after the bit was set and
 * finds it. Bits are set and taken atomically, so exactly one of the two raises the interrupt.
 * tests/unit/gateway/test_idle_model.py searches all interleavings of this.
 *
 * How long a vCPU polls follows what happened before: as long as the last signal would have needed, when that was
 * short; half as long after each poll in vain; so a guest that does nothing is not polled for at all. Other interrupts
 * must not be late: in xAPIC mode the vCPU looks at its local APIC every LOOK_NS. In x2APIC mode that is not possible,
 * but the MSR writes by which a guest starts its timer, and interrupts another vCPU, are known, and so is `passed`, the
 * number of interrupts that the emulator sent through QEMU because the vCPU ran; what remains (devices of QEMU) is late
 * by at most the length of one poll, which is then halved.
 */
#include "gateway.h"

#include <sched.h>

#define MIN_WINDOW_NS UINT64_C(10000)
#define LOOK_NS UINT64_C(20000)
#define BEFORE_TIMER_NS UINT64_C(10000)
/* A gap of this length in the time of a vCPU that polls: another thread needed the processor. */
#define GAP_NS UINT64_C(200000)
#define MIN_BACK_OFF_NS UINT64_C(20000000)
#define MAX_BACK_OFF_NS UINT64_C(1280000000)
#define FORGIVEN_AFTER 64 /* polls with success and without a gap */
#define PENDING_WORDS (GATEWAY_VECTORS / 64)

static bool pending(const struct gateway_vcpu *shared)
{
    for (int word = 0; word < PENDING_WORDS; word++) {
        if (atomic_load_explicit(&shared->pending[word], memory_order_acquire)) {
            return true;
        }
    }
    return false;
}

static void raise_pending(struct vcpu_state *vcpu)
{
    struct gateway_vcpu *shared = vcpu->shared;
    bool failed = false;

    for (unsigned int word = 0; word < PENDING_WORDS; word++) {
        if (!atomic_load_explicit(&shared->pending[word], memory_order_relaxed)) {
            continue;
        }
        uint64_t taken = atomic_exchange(&shared->pending[word], 0);
        for (; taken; taken &= taken - 1) {
            if (apic_raise(vcpu, word * 64 + (unsigned int)__builtin_ctzll(taken))) {
                shared->raised++;
            } else {
                atomic_fetch_or(&shared->pending[word], taken & -taken);
                failed = true;
            }
        }
    }
    if (failed) { /* the emulator has to raise them through QEMU */
        atomic_fetch_add(&gateway.control->raise_failures, 1);
        emulator_wake();
    }
}

/*
 * The machine has no processor to spare: do not poll for a while, and longer each time. There, polling does harm: it
 * takes the processor from the thread that would send the interrupt, and a thread that never sleeps is scheduled last.
 */
static void back_off(struct idle_policy *idle, uint64_t now)
{
    idle->back_off_ns = idle->back_off_ns ? 2 * idle->back_off_ns : MIN_BACK_OFF_NS;
    if (idle->back_off_ns > MAX_BACK_OFF_NS) {
        idle->back_off_ns = MAX_BACK_OFF_NS;
    }
    idle->successes = 0;
    idle->quiet_until_ns = now + idle->back_off_ns;
}

static void forgive(struct idle_policy *idle)
{
    if (++idle->successes == FORGIVEN_AFTER) {
        idle->successes = 0;
        idle->back_off_ns /= 2;
        if (idle->back_off_ns < MIN_BACK_OFF_NS) {
            idle->back_off_ns = 0;
        }
    }
}

/* Return whether an interrupt was sent that does not show in `pending`: by another vCPU, or through QEMU. */
static bool interrupt_comes(const struct vcpu_state *vcpu)
{
    return vcpu->ipis_seen != atomic_load_explicit(&vcpu->ipis, memory_order_relaxed) ||
           vcpu->idle.passed_seen != atomic_load_explicit(&vcpu->shared->passed, memory_order_relaxed);
}

/* Return until when to poll; `now` or earlier: not at all. */
static uint64_t poll_until(struct vcpu_state *vcpu, uint64_t now)
{
    uint64_t window = vcpu->idle.window_ns;
    uint64_t limit = atomic_load_explicit(&gateway.control->poll_ns, memory_order_relaxed);

    if (window > limit) {
        window = limit;
    }
    if (!window || gateway.one_thread || now < vcpu->idle.quiet_until_ns || interrupt_comes(vcpu)) {
        return now;
    }
    uint64_t end = now + window, due = apic_timer_due(vcpu, now);
    return due && due < end + BEFORE_TIMER_NS ? due - BEFORE_TIMER_NS : end;
}

/* Return whether an interrupt is pending at `end` at the latest. */
static bool poll(struct vcpu_state *vcpu, uint64_t now, uint64_t end)
{
    uint64_t look = now;

    while (now < end) {
        if (now >= look) {
            if (apic_requests(vcpu)) {
                return false;
            }
            look = now + LOOK_NS;
        }
        for (int i = 0; i < 32; i++) {
            if (pending(vcpu->shared)) {
                return true;
            }
            pause_briefly();
        }
        if (interrupt_comes(vcpu)) {
            return false;
        }
        sched_yield();
        uint64_t before = now;
        now = clock_ns();
        if (now - before > GAP_NS) {
            back_off(&vcpu->idle, now);
            return false;
        }
    }
    return false;
}

/* Called before HLT at privilege level 0. */
void on_halt(unsigned int index, void *userdata)
{
    (void)userdata;
    if (index >= gateway.vcpus_max || !gateway.vcpus[index].ready) {
        return;
    }
    struct vcpu_state *vcpu = &gateway.vcpus[index];
    struct gateway_vcpu *shared = vcpu->shared;
    struct idle_policy *idle = &vcpu->idle;

    shared->halts++;
    idle->halted = true;
    idle->in_vain = false;
    if (atomic_load_explicit(&gateway.control->emulator, memory_order_relaxed) != EMULATOR_ACTIVE ||
        !apic_reachable(vcpu)) {
        atomic_store_explicit(&shared->idle, IDLE_HALTED, memory_order_relaxed);
        return;
    }
    uint64_t now = clock_ns();
    uint64_t end = poll_until(vcpu, now);
    idle->begun_ns = now;
    if (end > now) {
        shared->polls++;
        atomic_store_explicit(&shared->idle, IDLE_POLLING, memory_order_relaxed);
        idle->in_vain = !poll(vcpu, now, end);
        if (!idle->in_vain) {
            forgive(idle);
        }
        shared->polled_ns += clock_ns() - now;
    }
    atomic_store_explicit(&shared->idle, IDLE_HALTED, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    raise_pending(vcpu);
}

/* Called when an interrupt is delivered: adapt the length of the next poll to this halt, if there was one. */
void idle_ended(struct vcpu_state *vcpu)
{
    struct idle_policy *idle = &vcpu->idle;

    vcpu->ipis_seen = atomic_load_explicit(&vcpu->ipis, memory_order_relaxed);
    idle->passed_seen = atomic_load_explicit(&vcpu->shared->passed, memory_order_relaxed);
    if (!idle->halted) {
        return;
    }
    idle->halted = false;
    atomic_store_explicit(&vcpu->shared->idle, IDLE_RUNNING, memory_order_relaxed);
    uint64_t now = clock_ns(), missed = atomic_load_explicit(&vcpu->shared->missed, memory_order_relaxed);
    uint64_t wanted = 2 * (now - idle->begun_ns);
    uint64_t limit = atomic_load_explicit(&gateway.control->poll_ns, memory_order_relaxed);
    if (missed != idle->missed_seen && wanted <= 2 * limit) {
        idle->window_ns = wanted > limit ? limit : wanted > idle->window_ns ? wanted : idle->window_ns;
    } else if (idle->in_vain) {
        idle->window_ns = idle->window_ns / 2 < MIN_WINDOW_NS ? 0 : idle->window_ns / 2;
    }
    idle->missed_seen = missed;
    vcpu->shared->poll_window_ns = (uint32_t)idle->window_ns;
    apic_timer_fired(vcpu, now);
}

/* Called when the vCPU is created, which happens again when one with the same index is plugged in later. */
void idle_start(struct vcpu_state *vcpu)
{
    for (int word = 0; word < PENDING_WORDS; word++) {
        atomic_store(&vcpu->shared->pending[word], 0);
    }
    atomic_store(&vcpu->shared->idle, IDLE_RUNNING);
    vcpu->idle = (struct idle_policy){
        .missed_seen = atomic_load(&vcpu->shared->missed),
        .passed_seen = atomic_load(&vcpu->shared->passed),
    };
    vcpu->timer = (struct apic_timer){ 0 };
    vcpu->ipis_seen = atomic_load(&vcpu->ipis);
}
