/* SPDX-License-Identifier: MIT */
/* From transfers that are done to answers, or back to Python. */
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
 * The kernel stored into the pages of ``slot``: they are dirty, and where code was translated from them QEMU has to be
 * told. The order is that of GuestMemory: the store, a fence, then the look at the notes.
 */
static void stored(struct fastpath *path, const struct slot *slot)
{
    for (uint32_t i = 0; i < slot->pieces; i++) {
        const struct piece *piece = &slot->piece[i];
        uint64_t first = piece->offset >> PAGE_SHIFT, last = (piece->offset + piece->length - 1) >> PAGE_SHIFT;
        memset(path->dirty + first, 1, last - first + 1);
    }
    if (!path->notes)
        return;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < slot->pieces; i++) {
        const struct piece *piece = &slot->piece[i];
        for (uint64_t at = piece->offset, end = piece->offset + piece->length; at < end;) {
            uint64_t next = (at & ~(PAGE - 1)) + PAGE;
            uint64_t step = (next < end ? next : end) - at, gpa = 0;
            for (uint32_t j = 0; j < path->region_count; j++) {
                const struct region *region = &path->region[j];
                uint64_t start = region->start + (uint64_t)region->delta;
                if (at >= start && at - start < region->end - region->start)
                    gpa = at - (uint64_t)region->delta;
            }
            uint64_t page = gpa >> PAGE_SHIFT;
            if (page >= path->note_pages || path->notes[page]) {
                if (page < path->note_pages)
                    path->notes[page] = 0;
                path->noted[path->noted_ranges++] = (struct noted){gpa, step};
            }
            at += step;
        }
    }
}

static void count(struct fastpath *path, const struct slot *slot)
{
    struct unit *unit = &path->unit[slot->unit];
    uint64_t spent = now_ns() - slot->begun_ns;

    if (!spent)
        spent = 1;
    if (!unit->least_ns || spent < unit->least_ns)
        unit->least_ns = spent;
    if (spent > unit->greatest_ns)
        unit->greatest_ns = spent;
    int bucket = (int)floor(log2((double)spent * 1e-9) * 4) + BUCKET_BIAS;
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
    path->event[path->events++] = (struct event){slot->channel, kind, offset, length};
}

static void answer(struct fastpath *path, const struct slot *slot)
{
    uint32_t offset = path->events * ANSWER_STRIDE;
    uint8_t *packet = path->output + offset, *body = packet + DESCRIPTOR_SIZE;
    uint32_t size = (DESCRIPTOR_SIZE + slot->answer_size + 7) & ~7u;

    memset(packet, 0, ANSWER_STRIDE);
    put16(packet + DESCRIPTOR_TYPE, TYPE_COMPLETION);
    put16(packet + DESCRIPTOR_DATA_OFFSET8, DESCRIPTOR_SIZE / 8);
    put16(packet + DESCRIPTOR_LENGTH8, (uint16_t)(size / 8));
    memcpy(packet + DESCRIPTOR_TRANSACTION_ID, slot->packet + DESCRIPTOR_TRANSACTION_ID, 8);
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
    event(path, slot, EVENT_ANSWER, offset, size);
}

static void done(struct fastpath *path, uint32_t number, int64_t result)
{
    struct slot *slot = &path->slot[number];

    if (result == slot->length) {
        /* A unit without a file stores nothing. */
        if (!slot->is_write && !(path->unit[slot->unit].flags & UNIT_NULL))
            stored(path, slot);
        count(path, slot);
        answer(path, slot);
    } else {
        if (!slot->is_write)
            stored(path, slot); /* a part of it, perhaps */
        event(path, slot, EVENT_GIVEN_BACK, number, slot->packet_size);
    }
    path->unit[slot->unit].depth--;
    path->in_flight--;
    slot->in_use = 0;
    slot->next_free = path->first_free;
    path->first_free = number;
}

/* The packet of slot ``number``, which was given back. */
EXPORT const uint8_t *fastpath_packet(const struct fastpath *path, uint32_t number)
{
    return path->slot[number < MAX_SLOTS ? number : 0].packet;
}

/*
 * Look what is done: path->event, as many as path->events says, and path->noted. A packet that is given back lies in
 * its slot (event.offset) until the next take(). Call again if it returns MAX_EVENTS.
 */
EXPORT uint32_t fastpath_reap(struct fastpath *path)
{
    struct uring *ring = &path->uring;
    uring_collect(ring);
    uint32_t head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);

    path->events = path->noted_ranges = 0;
    for (uint32_t i = 0; i < path->waiting_count; i++)
        done(path, path->waiting[i], path->slot[path->waiting[i]].length);
    path->waiting_count = 0;
    while (head != tail && path->events < MAX_EVENTS && path->noted_ranges + MAX_PAGES < MAX_NOTED) {
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
    return path->events;
}

/*
 * reap(), but look for a while if nothing is done yet: for transfers where they usually do not take long, and where none
 * is under way for ``word``, the write index of a guest's ring, to be another than ``value`` (and with transfers for that
 * too).
 */
EXPORT uint32_t fastpath_wait(struct fastpath *path, const uint32_t *word, uint32_t value)
{
    uint64_t spin = !path->in_flight ? path->idle_spin_ns : path->usual_ns < path->spin_ns ? path->spin_ns : 0;

    if (!path->waiting_count && spin) {
        uint64_t end = now_ns() + spin;
        while (!uring_ready(&path->uring) && (!word || __atomic_load_n(word, __ATOMIC_RELAXED) == value) &&
               now_ns() < end)
            __builtin_ia32_pause();
    }
    return fastpath_reap(path);
}

/* Whether the event file descriptor tells of what is done. 1: something is done already. */
EXPORT uint32_t fastpath_arm(struct fastpath *path, uint32_t on)
{
    struct uring *ring = &path->uring;

    __atomic_store_n(ring->cq_flags, on ? 0 : IORING_CQ_EVENTFD_DISABLED, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return path->waiting_count || uring_ready(ring);
}
