/* SPDX-License-Identifier: MIT */
/* An io_uring (io_uring(7)) through its system calls, without liburing; one thread uses it. */
#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"

/* To be called in the thread that uses the ring: the kernel allows no other. */
int uring_open(struct uring *ring, uint32_t entries)
{
    struct io_uring_params params;

    memset(&params, 0, sizeof(params));
    memset(ring, 0, sizeof(*ring));
    /* Completions wait until they are collected, instead of interrupting this thread one by one (Linux 6.1). */
    params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
    ring->fd = (int)syscall(SYS_io_uring_setup, entries, &params);
    if (ring->fd < 0) {
        memset(&params, 0, sizeof(params));
        ring->fd = (int)syscall(SYS_io_uring_setup, entries, &params);
    }
    if (ring->fd < 0)
        return -1;
    ring->sq_size = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    ring->cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->sqe_size = params.sq_entries * sizeof(struct io_uring_sqe);
    int both = PROT_READ | PROT_WRITE;
    ring->sq_map = mmap(NULL, ring->sq_size, both, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQ_RING);
    ring->cq_map = mmap(NULL, ring->cq_size, both, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_CQ_RING);
    ring->sqe_map = mmap(NULL, ring->sqe_size, both, MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
    if (ring->sq_map == MAP_FAILED || ring->cq_map == MAP_FAILED || ring->sqe_map == MAP_FAILED) {
        uring_close(ring);
        return -1;
    }
    uint8_t *sq = ring->sq_map, *cq = ring->cq_map;
    ring->sq_tail = (uint32_t *)(sq + params.sq_off.tail);
    ring->sq_flags = (uint32_t *)(sq + params.sq_off.flags);
    ring->sq_mask = *(uint32_t *)(sq + params.sq_off.ring_mask);
    ring->cq_head = (uint32_t *)(cq + params.cq_off.head);
    ring->cq_tail = (uint32_t *)(cq + params.cq_off.tail);
    ring->cq_mask = *(uint32_t *)(cq + params.cq_off.ring_mask);
    ring->cqes = cq + params.cq_off.cqes;
    ring->sq_entries = params.sq_entries;
    uint32_t *array = (uint32_t *)(sq + params.sq_off.array);
    for (uint32_t i = 0; i < params.sq_entries; i++)
        array[i] = i;
    ring->tail = *ring->sq_tail;
    return 0;
}

void uring_close(struct uring *ring)
{
    if (ring->sq_map && ring->sq_map != MAP_FAILED)
        munmap(ring->sq_map, ring->sq_size);
    if (ring->cq_map && ring->cq_map != MAP_FAILED)
        munmap(ring->cq_map, ring->cq_size);
    if (ring->sqe_map && ring->sqe_map != MAP_FAILED)
        munmap(ring->sqe_map, ring->sqe_size);
    close(ring->fd);
}

/* Return an empty submission entry; NULL if all are used. */
void *uring_entry(struct uring *ring)
{
    if (ring->unsubmitted >= ring->sq_entries)
        return NULL;
    struct io_uring_sqe *entry = (struct io_uring_sqe *)ring->sqe_map + (ring->tail & ring->sq_mask);
    memset(entry, 0, sizeof(*entry));
    ring->tail++;
    ring->unsubmitted++;
    return entry;
}

/* Return whether completions are in the ring, or would be after uring_collect(). */
int uring_ready(const struct uring *ring)
{
    return *ring->cq_head != __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) ||
           (__atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

/* Have the kernel put outstanding completions into the ring. */
void uring_collect(const struct uring *ring)
{
    if (__atomic_load_n(ring->sq_flags, __ATOMIC_RELAXED) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW))
        syscall(SYS_io_uring_enter, ring->fd, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0);
}

/* Pass the entries to the kernel; `wait`: sleep until a completion is there. Return 0, or a negative errno. */
int uring_submit(struct uring *ring, uint32_t wait)
{
    __atomic_store_n(ring->sq_tail, ring->tail, __ATOMIC_RELEASE);
    long taken = syscall(SYS_io_uring_enter, ring->fd, ring->unsubmitted, wait, wait ? IORING_ENTER_GETEVENTS : 0, NULL,
                         0);
    if (taken < 0)
        return errno == EAGAIN || errno == EBUSY || errno == EINTR ? 0 : -errno;
    ring->unsubmitted -= (uint32_t)taken;
    return 0;
}
