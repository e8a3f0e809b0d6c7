/* SPDX-License-Identifier: MIT */
/*
 * Signals to the guest: event flags in its memory, and interrupts that a vCPU raises by itself.
 *
 * docs/gateway.md#interrupts-before-hlt has the protocol, the gateway's idle.c the other side of it. All functions
 * may be called from any thread; none of them waits.
 */
#ifndef SIGNALS_H
#define SIGNALS_H

#include <stdint.h>

enum { VCPU_RUNNING = 0, VCPU_POLLING = 1, VCPU_HALTED = 2 }; /* IdleState of vmbus.wire.gateway */

/* The words of one vCPU that it shares with the emulator. */
struct vcpu_signals {
    uint32_t *idle;    /* stored by the vCPU */
    uint64_t *pending; /* a bit a vector: set here, taken by either side */
    uint64_t *missed;  /* signals that found it halted; in the next word, those that found it running */
};

uint32_t signals_set_bits(uint32_t *word, uint32_t bits);
uint32_t signals_post(const struct vcpu_signals *vcpu, uint32_t vector);
uint32_t signals_take_back(const struct vcpu_signals *vcpu, uint32_t vector);

#endif
