/* SPDX-License-Identifier: MIT */
#include "signals.h"

#define EXPORT __attribute__((visibility("default")))

/*
 * Set bits of a word in guest memory, whose other bits the guest clears at the same time; return the word from
 * before. A full fence: stores before it are visible to whoever sees the bits, and loads after it are made later.
 */
EXPORT uint32_t signals_set_bits(uint32_t *word, uint32_t bits)
{
    return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST);
}

/* Withdraw a vector from a vCPU; return 0 if it has been taken since, by the vCPU or by another thread. */
EXPORT uint32_t signals_take_back(const struct vcpu_signals *vcpu, uint32_t vector)
{
    uint64_t bit = (uint64_t)1 << vector % 64;

    return (__atomic_fetch_and(&vcpu->pending[vector / 64 % 4], ~bit, __ATOMIC_SEQ_CST) & bit) != 0;
}

/*
 * Leave a vector to a vCPU that polls. Return 1 if the interrupt is raised without the caller; 0 if the caller has to
 * raise it, through QEMU: that is counted for the vCPU, which need not poll then. The vector is set before `idle` is
 * read: a vCPU that stores HALTED after this read finds it.
 */
EXPORT uint32_t signals_post(const struct vcpu_signals *vcpu, uint32_t vector)
{
    uint64_t bit = (uint64_t)1 << vector % 64;

    __atomic_fetch_or(&vcpu->pending[vector / 64 % 4], bit, __ATOMIC_SEQ_CST);
    uint32_t idle = __atomic_load_n(vcpu->idle, __ATOMIC_SEQ_CST);
    if (idle == VCPU_POLLING || !signals_take_back(vcpu, vector))
        return 1;
    __atomic_fetch_add(&vcpu->missed[idle != VCPU_HALTED], 1, __ATOMIC_RELAXED);
    return 0;
}
