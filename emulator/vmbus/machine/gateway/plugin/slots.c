/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Requests: traps that the emulator has to answer.
 *
 * A vCPU has GATEWAY_SLOTS slots. Three sequence numbers, each with one writer, define the state of a slot:
 *
 *      request (G)  answer (E)  retired (G)     state
 *      n            < n         < n             pending: the emulator has to answer
 *      n            n           < n             answered: the vCPU has not fetched the answer
 *      n            any         n               free
 *
 * A vCPU sleeps for at most REST_NS. Then it executes the same instruction again, so that QEMU can stop, reset or
 * interrupt it in between, and finds its slot by the key. A trap in an interrupt handler gets a slot of its own.
 * An answered slot whose answer was never fetched (the guest was reset) can be reused, the oldest first. A slot that
 * is not answered is never reused, because the emulator may be reading it.
 */
#define _GNU_SOURCE
#include "gateway.h"

#include <errno.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define REST_NS 1000000

static void futex_wait(void *word, uint32_t expected)
{
    struct timespec limit = { .tv_nsec = REST_NS };
    syscall(SYS_futex, word, FUTEX_WAIT, expected, &limit, NULL, 0);
}

/* Wake the emulator if it sleeps. The caller has stored the new work before. */
void emulator_wake(void)
{
    uint64_t one = 1;

    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&gateway.control->waiting, memory_order_relaxed)) {
        ssize_t written = write(gateway.event_fd, &one, sizeof(one));
        (void)written; /* EAGAIN: the counter is full, so the emulator wakes anyway */
    }
}

/* The same for the engine. The descriptor is the listener's, which replaces what is behind it, and never closes it. */
void engine_wake(void)
{
    uint64_t one = 1;

    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&gateway.control->engine_waiting, memory_order_relaxed)) {
        ssize_t written = write(__atomic_load_n(&gateway.engine_fd, __ATOMIC_RELAXED), &one, sizeof(one));
        (void)written;
    }
}

/* Sleep until an emulator is active, for at most REST_NS. */
void emulator_rest(void)
{
    uint32_t state = atomic_load(&gateway.control->emulator);

    if (state != EMULATOR_ACTIVE) {
        futex_wait(&gateway.control->emulator, state);
    }
}

static struct gateway_answer *answer_of(struct vcpu_state *vcpu, int slot)
{
    return &vcpu->shared->answers[slot];
}

static bool answered(struct vcpu_state *vcpu, int slot)
{
    return atomic_load_explicit(&answer_of(vcpu, slot)->sequence, memory_order_acquire) ==
           vcpu->slots[slot].sequence;
}

static void retire(struct vcpu_state *vcpu, int slot)
{
    vcpu->slots[slot].busy = false;
    atomic_store_explicit(&vcpu->shared->retired[slot], vcpu->slots[slot].sequence, memory_order_release);
}

static int find(struct vcpu_state *vcpu, const struct trap_key *key)
{
    for (int slot = 0; slot < GATEWAY_SLOTS; slot++) {
        if (vcpu->slots[slot].busy && memcmp(&vcpu->slots[slot].key, key, sizeof(*key)) == 0) {
            return slot;
        }
    }
    return -1;
}

/* Return whether the vCPU has made a request whose answer it has not fetched: its next trap may repeat it. */
bool slots_in_use(const struct vcpu_state *vcpu)
{
    for (int slot = 0; slot < GATEWAY_SLOTS; slot++) {
        if (vcpu->slots[slot].busy) {
            return true;
        }
    }
    return false;
}

bool slots_repeated(struct vcpu_state *vcpu, const struct trap_key *key)
{
    return find(vcpu, key) >= 0;
}

/* Return a free slot, or the oldest slot with an unfetched answer; -1 if all are pending. */
static int claim(struct vcpu_state *vcpu)
{
    int oldest = -1;

    for (int slot = 0; slot < GATEWAY_SLOTS; slot++) {
        if (!vcpu->slots[slot].busy) {
            return slot;
        }
        if (answered(vcpu, slot) &&
            (oldest < 0 || vcpu->slots[slot].sequence_age < vcpu->slots[oldest].sequence_age)) {
            oldest = slot;
        }
    }
    if (oldest >= 0) {
        retire(vcpu, oldest);
    }
    return oldest;
}

static void ask(struct vcpu_state *vcpu, int slot, const struct trap_key *key, bool long_mode)
{
    struct slot_state *state = &vcpu->slots[slot];
    struct gateway_slot *shared = &vcpu->shared->slots[slot];

    state->busy = true;
    state->sequence++;
    state->sequence_age = ++vcpu->asked;
    state->key = *key;
    *shared = (struct gateway_slot){
        .kind = (uint32_t)key->kind,
        .flags = long_mode ? SLOT_LONG_MODE : 0,
        .tsc = clock_tsc(),
        .pc = key->pc,
        .rax = key->rax,
        .rbx = key->rbx,
        .rcx = key->rcx,
        .rdx = key->rdx,
        .rsi = key->rsi,
        .rdi = key->rdi,
        .r8 = key->r8,
        .rsp = key->rsp,
    };
    vcpu->shared->requests++;
    atomic_store_explicit(&vcpu->requests[slot], state->sequence, memory_order_release);
    emulator_wake();
}

/* Spin for spin_ns, then sleep for at most REST_NS, until the slot is answered. Return whether it is. */
static bool await(struct vcpu_state *vcpu, int slot)
{
    uint32_t spin_ns = atomic_load_explicit(&gateway.control->spin_ns, memory_order_relaxed);

    if (spin_ns && atomic_load_explicit(&gateway.control->emulator, memory_order_relaxed) != EMULATOR_NONE) {
        uint64_t end = clock_ns() + (spin_ns < REST_NS ? spin_ns : REST_NS);
        do {
            for (int i = 0; i < 16; i++) {
                if (answered(vcpu, slot)) {
                    return true;
                }
                pause_briefly();
            }
        } while (clock_ns() < end);
    }

    _Atomic uint64_t *sequence = &answer_of(vcpu, slot)->sequence;
    uint64_t before = vcpu->slots[slot].sequence;
    atomic_store_explicit(&vcpu->shared->sleeping, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    uint64_t found = atomic_load_explicit(sequence, memory_order_acquire);
    if (found != before) {
        /* The low half changes with every answer; hosts are little-endian. */
        futex_wait(sequence, (uint32_t)found);
    }
    atomic_store_explicit(&vcpu->shared->sleeping, 0, memory_order_relaxed);
    return answered(vcpu, slot);
}

/*
 * Answer a VMCALL with its listed status if no emulator was attached for longer than hold_timeout_ms. The status makes
 * the guest try again later. No emulator can attach while the lock is held, so a pending request can be withdrawn.
 */
static bool give_up(struct vcpu_state *vcpu, const struct trap_key *key, bool long_mode, int slot,
                    uint64_t *value)
{
    struct gateway_control *control = gateway.control;
    uint32_t limit_ms = atomic_load_explicit(&control->hold_timeout_ms, memory_order_relaxed);
    uint32_t status;

    if (key->kind != KIND_VMCALL || !limit_ms || atomic_load(&control->emulator) != EMULATOR_NONE ||
        !tables_gone((uint32_t)((long_mode ? key->rcx : key->rax) & 0xffff), &status)) {
        return false;
    }
    bool given_up = false;
    pthread_mutex_lock(&gateway.lock);
    if (atomic_load(&control->emulator) == EMULATOR_NONE &&
        clock_ns() - gateway.gone_since_ns >= limit_ms * UINT64_C(1000000) &&
        (slot < 0 || !answered(vcpu, slot))) {
        if (slot >= 0) {
            retire(vcpu, slot);
        }
        vcpu->shared->gone_results++;
        *value = status;
        given_up = true;
    }
    pthread_mutex_unlock(&gateway.lock);
    return given_up;
}

enum slot_outcome slots_ask(struct vcpu_state *vcpu, const struct trap_key *key, bool long_mode, uint64_t *value)
{
    int slot = find(vcpu, key);

    if (slot >= 0) {
        vcpu->shared->retries++;
    }
    if ((slot < 0 || !answered(vcpu, slot)) && give_up(vcpu, key, long_mode, slot, value)) {
        return OUTCOME_VALUE;
    }
    if (slot < 0) {
        slot = claim(vcpu);
        if (slot < 0) {
            vcpu->shared->no_slot++;
            futex_wait(&answer_of(vcpu, 0)->sequence,
                       (uint32_t)atomic_load(&answer_of(vcpu, 0)->sequence));
            return OUTCOME_RETRY;
        }
        ask(vcpu, slot, key, long_mode);
    }
    if (!answered(vcpu, slot) && !await(vcpu, slot)) {
        return OUTCOME_RETRY;
    }
    uint32_t verdict = answer_of(vcpu, slot)->verdict;
    *value = answer_of(vcpu, slot)->value;
    retire(vcpu, slot);
    switch (verdict) {
    case VERDICT_OK:
        return OUTCOME_VALUE;
    case VERDICT_FAULT:
        return OUTCOME_FAULT;
    default:
        return OUTCOME_RETRY;
    }
}
