/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The relation of the guest's TSC to the host's.
 *
 * Under TCG the guest's TSC is the host's TSC minus an offset, which changes when the machine is stopped and
 * continued. The host's TSC is read directly before and after an RDTSC of the guest: the offset lies between the two
 * differences to the value that the guest read. The bounds of TSC_SAMPLES samples are intersected. If two bounds
 * exclude each other, the offset has changed, and sampling starts again.
 *
 * RDTSC ends a translation block, so "after" is the start of the block at the next address. on_translation records
 * these addresses here. Both callbacks are conditional on a word of the vCPU that is 0 once there are enough samples,
 * so a guest that reads its TSC often is not slowed down.
 */
#define _GNU_SOURCE
#include "gateway.h"

#include <time.h>

#define TSC_SAMPLES 64
#define PAIR_AGE_NS UINT64_C(10000000)
#define FREQUENCY_AFTER_NS UINT64_C(20000000) /* accurate to a few ppm after that time */

static _Atomic uint64_t refreshed_ns; /* time of the last published pair */

uint64_t clock_tsc(void)
{
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc();
#else
    return 0;
#endif
}

uint64_t clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* Read both clocks at one moment: the fastest of a few readings. */
static void clock_pair(uint64_t *tsc, uint64_t *ns)
{
    uint64_t least = UINT64_MAX;

    for (int attempt = 0; attempt < 4; attempt++) {
        uint64_t before = clock_tsc();
        uint64_t now = clock_ns();
        uint64_t window = clock_tsc() - before;
        if (window < least) {
            least = window;
            *tsc = before + window / 2;
            *ns = now;
        }
    }
}

static void publish_begin(void)
{
    struct gateway_control *control = gateway.control;
    uint32_t sequence = atomic_load_explicit(&control->clock_sequence, memory_order_relaxed);

    atomic_store_explicit(&control->clock_sequence, sequence + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
}

static void publish_end(void)
{
    struct gateway_control *control = gateway.control;
    uint32_t sequence = atomic_load_explicit(&control->clock_sequence, memory_order_relaxed);

    atomic_store_explicit(&control->clock_sequence, sequence + 1, memory_order_release);
}

void clock_start(void)
{
    struct gateway_control *control = gateway.control;

    if (!clock_tsc()) {
        return;
    }
    control->tsc_known = 1;
    clock_pair(&gateway.first_tsc, &gateway.first_ns);
    control->pair_tsc = gateway.first_tsc;
    control->pair_ns = gateway.first_ns;
}

/* Publish pair and frequency again if they are old or `now` is set. Waits for the lock only if `now` is set. */
void clock_refresh(bool now)
{
    struct gateway_control *control = gateway.control;
    uint64_t tsc = 0, ns = 0;

    if (!control->tsc_known || (!now && clock_ns() - atomic_load(&refreshed_ns) < PAIR_AGE_NS)) {
        return;
    }
    if (now) {
        pthread_mutex_lock(&gateway.clock_lock);
    } else if (pthread_mutex_trylock(&gateway.clock_lock) != 0) {
        return;
    }
    clock_pair(&tsc, &ns);
    publish_begin();
    control->pair_tsc = tsc;
    control->pair_ns = ns;
    if (ns - gateway.first_ns >= FREQUENCY_AFTER_NS) {
        control->tsc_frequency =
            (uint64_t)((unsigned __int128)(tsc - gateway.first_tsc) * 1000000000u / (ns - gateway.first_ns));
    }
    publish_end();
    atomic_store(&refreshed_ns, ns);
    pthread_mutex_unlock(&gateway.clock_lock);
}

/* Called by the vCPU at traps and interrupts: start sampling if the emulator has changed `arm`. */
void clock_arm(unsigned int index, struct vcpu_state *vcpu)
{
    uint32_t arm = atomic_load_explicit(&gateway.control->arm, memory_order_relaxed);

    if (arm != vcpu->arm_seen) {
        vcpu->arm_seen = arm;
        qemu_plugin_u64_set(gateway.sampling, index, 1);
    }
}

/* Addresses directly after an RDTSC, where a block begins. A hash table in which entries replace each other. */
#define AFTER_SIZE 1024
static _Atomic uint64_t after_rdtsc[AFTER_SIZE];

void clock_note_rdtsc(uint64_t next)
{
    atomic_store_explicit(&after_rdtsc[next % AFTER_SIZE], next, memory_order_relaxed);
}

bool clock_follows_rdtsc(uint64_t start)
{
    return atomic_load_explicit(&after_rdtsc[start % AFTER_SIZE], memory_order_relaxed) == start;
}

static bool sampling_vcpu(unsigned int index)
{
    return index < gateway.vcpus_max && gateway.vcpus[index].ready && gateway.control->tsc_known;
}

/* Runs before an RDTSC, while `sampling` of the vCPU is not 0. */
void clock_before_rdtsc(unsigned int index, void *userdata)
{
    (void)userdata;
    if (sampling_vcpu(index)) {
        gateway.vcpus[index].tsc_before = clock_tsc();
    }
}

/* Intersect the bounds with those of one sample. The caller holds clock_lock. */
static void add_sample(uint32_t arm, uint64_t lower, uint64_t upper)
{
    struct gateway_control *control = gateway.control;
    static uint64_t lowest, highest;

    if (control->arm_seen != arm || control->samples == 0) {
        control->samples = 0;
        lowest = lower;
        highest = upper;
    } else {
        lowest = (int64_t)(lower - lowest) > 0 ? lower : lowest;
        highest = (int64_t)(upper - highest) < 0 ? upper : highest;
        if ((int64_t)(highest - lowest) < 0) {
            control->samples = 0;
            lowest = lower;
            highest = upper;
        }
    }
    publish_begin();
    control->arm_seen = arm;
    control->samples++;
    control->tsc_offset = lowest + (highest - lowest) / 2;
    publish_end();
}

/* Runs before the instruction after an RDTSC, while `sampling` of the vCPU is not 0. */
void clock_after_rdtsc(unsigned int index, void *userdata)
{
    struct gateway_control *control = gateway.control;
    uint64_t after = clock_tsc();
    (void)userdata;

    if (!sampling_vcpu(index)) {
        return;
    }
    struct vcpu_state *vcpu = &gateway.vcpus[index];
    uint64_t before = vcpu->tsc_before;
    vcpu->tsc_before = 0;
    if (!before || pthread_mutex_trylock(&gateway.clock_lock) != 0) {
        return; /* no RDTSC came before, or another vCPU holds the lock */
    }
    uint32_t arm = vcpu->arm_seen;
    bool stale = arm != atomic_load(&control->arm);
    bool enough = control->arm_seen == arm && control->samples >= TSC_SAMPLES;
    if (!stale && !enough) {
        uint64_t guest = register_read(vcpu, GUEST_RDX) << 32 | (uint32_t)register_read(vcpu, GUEST_RAX);
        add_sample(arm, before - guest, after - guest);
    }
    pthread_mutex_unlock(&gateway.clock_lock);
    if (enough) {
        qemu_plugin_u64_set(gateway.sampling, index, 0);
    }
}
