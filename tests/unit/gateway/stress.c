/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Signals to guests that halt, as fast as they can be made: the gateway's idle.c and the emulator's signals.c, each in
 * threads of its own, with the guest's interrupt handler and QEMU's main loop replaced by a few lines.
 *
 * A signaller makes a signal of one of KINDS event flags of a vCPU: it counts one more in `produced`, sets the flag, and
 * interrupts if the flag was clear. The handler clears the flags and remembers what it saw of `produced`. Each signaller
 * waits from time to time until all its signals were seen. One that is not seen within LIMIT_NS was lost: its vCPU
 * halts, and nothing wakes it.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "gateway.h"
#include "signals.h"
#include "stub.h"

#define LIMIT_NS UINT64_C(10000000000)
#define MOST_KINDS 32
#define FIRST_VECTOR 0x3e /* so that two words of `pending` are used */

struct guest {
    uint32_t flags;
    _Atomic uint64_t produced[MOST_KINDS], seen[MOST_KINDS];
};

static struct guest guests[STUB_VCPUS];
static _Atomic bool over;
static _Atomic uint64_t sent, lost;
static unsigned int kinds, signallers, guests_count, count;

static void handler(struct guest *guest)
{
    uint32_t flags = __atomic_exchange_n(&guest->flags, 0, __ATOMIC_SEQ_CST);

    for (unsigned int kind = 0; kind < kinds; kind++) {
        if (flags >> kind & 1) {
            atomic_store(&guest->seen[kind], atomic_load(&guest->produced[kind]));
        }
    }
}

static void *vcpu_thread(void *argument)
{
    unsigned int index = (unsigned int)(intptr_t)argument;
    struct stub_vcpu *vcpu = &stub_vcpus[index];

    stub_current = vcpu;
    while (!atomic_load(&over)) {
        on_halt(index, NULL);
        bool any = false;
        while (!any && !atomic_load(&over)) {
            for (int word = 0; word < 8; word++) {
                any |= atomic_exchange(&vcpu->requested[word], 0) != 0;
            }
            if (!any) {
                sched_yield();
            }
        }
        stub_on_discontinuity(index, QEMU_PLUGIN_DISCON_INTERRUPT, 1, 2, NULL);
        handler(&guests[index]);
    }
    return NULL;
}

static bool seen(struct guest *guest, unsigned int kind, uint64_t what)
{
    return atomic_load(&guest->seen[kind]) >= what;
}

static void *signaller_thread(void *argument)
{
    unsigned int number = (unsigned int)(intptr_t)argument;
    uint64_t random = number * UINT64_C(0x9e3779b97f4a7c15) + 1;

    for (unsigned int i = 0; i < count && !atomic_load(&lost); i++) {
        random = random * UINT64_C(6364136223846793005) + 1442695040888963407u;
        unsigned int bits = (unsigned int)(random >> 33), index = bits % guests_count;
        unsigned int kind = (bits >> 8) % (kinds / signallers) + number * (kinds / signallers);
        struct guest *guest = &guests[index];
        struct gateway_vcpu *shared = gateway.vcpus[index].shared;
        struct vcpu_signals words = {
            .idle = (uint32_t *)&shared->idle, .pending = (uint64_t *)shared->pending,
            .missed = (uint64_t *)&shared->missed,
        };
        uint64_t what = atomic_fetch_add(&guest->produced[kind], 1) + 1;
        if (!(signals_set_bits(&guest->flags, 1u << kind) & 1u << kind) &&
            !signals_post(&words, FIRST_VECTOR + kind)) {
            atomic_fetch_add(&sent, 1);
            stub_interrupt(&stub_vcpus[index], FIRST_VECTOR + kind);
        }
        if (bits >> 24 & 3) {
            uint64_t end = clock_ns() + LIMIT_NS;
            while (!seen(guest, kind, what)) {
                if (clock_ns() > end) {
                    atomic_fetch_add(&lost, 1);
                    return NULL;
                }
                sched_yield();
            }
        }
        for (unsigned int pause = bits >> 16 & 63; pause; pause--) {
            pause_briefly();
        }
    }
    return NULL;
}

/* `count` signals of each of `signallers_` threads, with `kinds_` flags altogether. */
void stress(int vcpus, unsigned int signallers_, unsigned int kinds_, unsigned int count_)
{
    pthread_t vcpu_threads[STUB_VCPUS], signaller_threads[MOST_KINDS];
    uint64_t raised = 0;

    kinds = kinds_;
    signallers = signallers_;
    guests_count = (unsigned int)vcpus;
    count = count_;
    if (!signallers || kinds < signallers || kinds > MOST_KINDS) {
        abort();
    }
    atomic_store(&over, false);
    for (int i = 0; i < vcpus; i++) {
        pthread_create(&vcpu_threads[i], NULL, vcpu_thread, (void *)(intptr_t)i);
    }
    for (unsigned int i = 0; i < signallers; i++) {
        pthread_create(&signaller_threads[i], NULL, signaller_thread, (void *)(intptr_t)i);
    }
    for (unsigned int i = 0; i < signallers; i++) {
        pthread_join(signaller_threads[i], NULL);
    }
    atomic_store(&over, true);
    for (int i = 0; i < vcpus; i++) {
        pthread_join(vcpu_threads[i], NULL);
        raised += gateway.vcpus[i].shared->raised;
    }
    printf("stressed %u %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", count * signallers, raised, atomic_load(&sent),
           atomic_load(&lost));
}
