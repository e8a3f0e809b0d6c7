/* SPDX-License-Identifier: MIT */
/* From completed transfers to completion packets, or back to Python. */
#include <linux/io_uring.h>
#include <math.h>
#include <string.h>

#include "fastpath.h"

#define EXPORT __attribute__((visibility("default")))

static void put16(uint8_t *at, uint16_t value)
{
    memcpy(at, &value, sizeof(value));
}

static void put32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof(value));
}

/*
 * Mark the pages of ``slot``, which the kernel stored into, as dirty, and record those from which QEMU translated code.
 * The order is that of GuestMemory: the store, a fence, then the check of the notes.
 */
static void stored(struct fastpath *path, const struct slot *slot)
{
    for (uint32_t i = 0; i < slot->pieces; i++) {
        const struct piece *piece = &slot->piece[i];
        uint64_t first = piece->offset >> PAGE_SHIFT, last = (piece->offset + piece->length - 1) >> PAGE_SHIFT;
        memset(path->shared.dirty + first, 1, last - first + 1);
    }
    if (!path->shared.notes)
        return;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < slot->pieces; i++) {
        const struct piece *piece = &slot->piece[i];
        for (uint64_t at = piece->offset, end = piece->offset + piece->length; at < end;) {
            uint64_t next = (at & ~(PAGE - 1)) + PAGE;
            uint64_t step = (next < end ? next : end) - at, gpa = 0;
            for (uint32_t j = 0; j < path->shared.region_count; j++) {
                const struct region *region = &path->shared.region[j];
                uint64_t start = region->start + (uint64_t)region->delta;
                if (at >= start && at - start < region->end - region->start)
                    gpa = at - (uint64_t)region->delta;
            }
            uint64_t page = gpa >> PAGE_SHIFT;
            if (page >= path->shared.note_pages || path->shared.notes[page]) {
                if (page < path->shared.note_pages)
                    path->shared.notes[page] = 0;
                path->shared.noted[path->shared.noted_ranges++] = (struct noted){gpa, step};
            }
            at += step;
        }
    }
}

/* Count a request that was done. */
void count_request(struct unit *unit, const struct slot *slot)
{
    uint64_t spent = now_ns() - slot->begun_ns;

    if (!spent)
        spent = 1;
    if (!unit->min_ns || spent < unit->min_ns)
        unit->min_ns = spent;
    if (spent > unit->max_ns)
        unit->max_ns = spent;
    int bucket = (int)floor(log2((double)spent * 1e-9) * BUCKETS_PER_OCTAVE) + BUCKET_BIAS;
    unit->buckets[bucket < 0 ? 0 : bucket >= MAX_BUCKETS ? MAX_BUCKETS - 1 : bucket]++;
    if (slot->is_write) {
        unit->writes++;
        unit->bytes_written += slot->length;
    } else {
        unit->reads++;
        unit->bytes_read += slot->length;
    }
}

static void event(struct fastpath *path, const struct slot *slot, uint32_t kind, uint32_t offset, uint32_t length)
{
    path->shared.event[path->shared.events++] = (struct event){slot->channel, kind, offset, length};
}

/* Write the completion packet of a request that was done, without trailer; return its size. */
uint32_t build_answer(const struct slot *slot, const uint8_t *packet, uint8_t *answer)
{
    uint8_t *body = answer + DESCRIPTOR_SIZE;
    uint32_t size = (DESCRIPTOR_SIZE + slot->answer_size + 7) & ~7u;

    memset(answer, 0, ANSWER_STRIDE);
    put16(answer + DESCRIPTOR_TYPE, TYPE_COMPLETION);
    put16(answer + DESCRIPTOR_DATA_OFFSET8, DESCRIPTOR_SIZE / 8);
    put16(answer + DESCRIPTOR_LENGTH8, (uint16_t)(size / 8));
    memcpy(answer + DESCRIPTOR_TRANSACTION_ID, packet + DESCRIPTOR_TRANSACTION_ID, 8);
    put32(body + REQUEST_OPERATION, OPERATION_COMPLETE_IO);
    put16(body + REQUEST_LENGTH, SRB_SIZE);
    body[REQUEST_SRB_STATUS] = SRB_STATUS_SUCCESS;
    body[REQUEST_PORT] = slot->request[REQUEST_PORT];
    body[REQUEST_PATH] = slot->request[REQUEST_PATH];
    body[REQUEST_TARGET] = slot->request[REQUEST_TARGET];
    body[REQUEST_LUN] = slot->request[REQUEST_LUN];
    body[REQUEST_CDB_LENGTH] = slot->request[REQUEST_CDB_LENGTH];
    body[REQUEST_DIRECTION] = slot->request[REQUEST_DIRECTION];
    body[REQUEST_PROPERTIES] = slot->request[REQUEST_PROPERTIES];
    put32(body + REQUEST_TRANSFER_LENGTH, slot->length);
    return size;
}

static void answer(struct fastpath *path, const struct slot *slot)
{
    uint32_t offset = path->shared.events * ANSWER_STRIDE;

    event(path, slot, EVENT_ANSWER, offset, build_answer(slot, slot->packet, path->shared.output + offset));
}

static void done(struct fastpath *path, uint32_t number, int64_t result)
{
    struct slot *slot = &path->slot[number];

    if (result == slot->length) {
        /* Nothing is stored for a unit without a file. */
        if (!slot->is_write && !(path->shared.unit[slot->unit].flags & UNIT_NULL))
            stored(path, slot);
        count_request(&path->shared.unit[slot->unit], slot);
        answer(path, slot);
    } else {
        if (!slot->is_write)
            stored(path, slot); /* part of the data may have been stored */
        event(path, slot, EVENT_RETURNED, number, slot->packet_size);
    }
    path->shared.unit[slot->unit].depth--;
    path->shared.in_flight--;
    slot->in_use = 0;
    slot->next_free = path->first_free;
    path->first_free = number;
}

/* Return the packet of slot ``number``, after an EVENT_RETURNED. */
EXPORT const uint8_t *fastpath_packet(const struct fastpath *path, uint32_t number)
{
    return path->slot[number < MAX_SLOTS ? number : 0].packet;
}

/*
 * Report requests that have ended in shared.event, and ranges with translated code in shared.noted. Return the number
 * of events; call again if it is MAX_EVENTS or if ranges were noted. The packet of an EVENT_RETURNED stays in its slot
 * until the next fastpath_take().
 */
EXPORT uint32_t fastpath_reap(struct fastpath *path)
{
    struct uring *ring = &path->uring;
    uring_collect(ring);
    uint32_t head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);

    path->shared.events = path->shared.noted_ranges = 0;
    for (uint32_t i = 0; i < path->waiting_count; i++)
        done(path, path->waiting[i], path->slot[path->waiting[i]].length);
    path->waiting_count = 0;
    while (head != tail && path->shared.events < MAX_EVENTS && path->shared.noted_ranges + MAX_PAGES < MAX_NOTED) {
        const struct io_uring_cqe *entry = (const struct io_uring_cqe *)ring->cqes + (head & ring->cq_mask);
        uint64_t number = entry->user_data;
        int32_t result = entry->res;
        head++;
        if (number >= MAX_SLOTS || !path->slot[number].in_use)
            continue;
        uint64_t spent = now_ns() - path->slot[number].begun_ns;
        path->usual_ns = path->usual_ns ? (path->usual_ns * 7 + spent) / 8 : spent;
        done(path, (uint32_t)number, result);
    }
    __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    return path->shared.events;
}

/*
 * fastpath_reap(), after a short busy wait if nothing has ended yet: for a completion, where transfers usually end
 * within spin_ns, and for ``word``, the write index of a guest's ring, to differ from ``value``. With no transfer under
 * way the wait is for ``word`` alone, idle_spin_ns at most. ``word`` may be NULL.
 */
EXPORT uint32_t fastpath_wait(struct fastpath *path, const uint32_t *word, uint32_t value)
{
    uint64_t spin = 0;

    if (!path->shared.in_flight)
        spin = path->shared.idle_spin_ns;
    else if (path->usual_ns < path->shared.spin_ns)
        spin = path->shared.spin_ns;

    if (!path->waiting_count && spin) {
        uint64_t end = now_ns() + spin;
        while (!uring_ready(&path->uring) && (!word || __atomic_load_n(word, __ATOMIC_RELAXED) == value) &&
               now_ns() < end)
            __builtin_ia32_pause();
    }
    return fastpath_reap(path);
}

/* Switch signals on the event file descriptor on or off. Return 1 if a transfer has ended already. */
EXPORT uint32_t fastpath_arm(struct fastpath *path, uint32_t on)
{
    struct uring *ring = &path->uring;

    __atomic_store_n(ring->cq_flags, on ? 0 : IORING_CQ_EVENTFD_DISABLED, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return path->waiting_count || uring_ready(ring);
}
