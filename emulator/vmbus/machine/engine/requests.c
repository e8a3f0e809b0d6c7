/* SPDX-License-Identifier: MIT */
/*
 * Requests, from the packet to the answer, and the mirror of them for a successor.
 *
 *      FREE --rings_take()--> TAKEN --device: take--> UNDER_WAY --completion--> DONE --rings_deliver()--> FREE
 *                                                              |          |
 *             the channel is Python's meanwhile, or it failed: +----------+--> PYTHON --engine_release()--> FREE
 */
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>

#include "engine.h"

static struct mirror *mirror(const struct engine *engine)
{
    return (struct mirror *)engine->setup.mirror;
}

uint32_t request_new(struct engine *engine)
{
    uint32_t slot = engine->first_free;

    if (slot < MAX_SLOTS) {
        engine->first_free = engine->request[slot].next;
        engine->request[slot].noted = 0;
        engine->request[slot].answer_size = 0;
        engine->request[slot].queue = 0;
    }
    return slot;
}

void request_free(struct engine *engine, uint32_t slot)
{
    struct request *request = &engine->request[slot];
    struct channel *channel = &engine->channel[request->channel];

    if (request->state != FREE && channel->opening == request->opening)
        channel->outstanding--;
    engine->request[slot].state = FREE;
    STEP();
    __atomic_store_n(&mirror(engine)->slot[slot].state, FREE, __ATOMIC_RELEASE);
    engine->request[slot].next = engine->first_free;
    engine->first_free = slot;
}

/*
 * Copy what a successor needs; the state is stored last. A request that is done stays one that is taken until its
 * answer is complete: at every moment the mirror has it as one or the other.
 */
void request_mirror(struct engine *engine, uint32_t slot)
{
    const struct request *request = &engine->request[slot];
    const struct channel *channel = &engine->channel[request->channel];
    struct mirror_slot *copy = &mirror(engine)->slot[slot];

    if (request->state == TAKEN) {
        copy->channel = request->channel;
        copy->opening = request->opening;
        copy->taken_number = request->taken_number;
        copy->size = request->size;
        memcpy(copy->packet, request->packet, request->size);
    }
    STEP();
    if (request->state == DONE) {
        copy->done_number = channel->done_number;
        copy->answer_size = request->answer_size;
        memcpy(copy->answer, request->answer, request->answer_size);
    }
    STEP();
    __atomic_store_n(&copy->state, request->state, __ATOMIC_RELEASE);
    STEP();
}

/*
 * Make an empty mirror of memory that an engine of before may have used. Its records are gone before the epoch is
 * another one: whoever knows them by the old one finds no mirror at all.
 */
void mirror_begin(struct mirror *mirror)
{
    uint8_t *records = (uint8_t *)mirror->channel;
    size_t size = sizeof(*mirror) - sizeof(mirror->header);
    uint32_t epoch = mirror->header.epoch + 1;

    __atomic_store_n(&mirror->header.magic, 0, __ATOMIC_RELEASE);
    STEP();
    if (madvise(records, size, MADV_REMOVE) != 0) /* zeros, without memory behind them */
        memset(records, 0, size);
    STEP();
    mirror->header = (struct mirror_header){
        .version = MIRROR_VERSION, .channels = MAX_CHANNELS, .slots = MAX_SLOTS, .epoch = epoch,
    };
    __atomic_store_n(&mirror->header.magic, MIRROR_MAGIC, __ATOMIC_RELEASE);
}

/* Publish how far the rings are: an index, and the number of the request that it covers, in one store each. */
void channel_mirror(struct engine *engine, uint32_t number)
{
    const struct channel *channel = &engine->channel[number];
    struct mirror_channel *copy = &mirror(engine)->channel[number];

    __atomic_store_n(&copy->owner, channel->owner, __ATOMIC_RELEASE);
    __atomic_store_n(&copy->opening, channel->opening, __ATOMIC_RELEASE);
    STEP();
    __atomic_store_n(&copy->taken, (uint64_t)channel->taken_number << 32 | channel->in.index, __ATOMIC_RELEASE);
    STEP();
    __atomic_store_n(&copy->answered, (uint64_t)channel->answered_number << 32 | channel->out.index,
                     __ATOMIC_RELEASE);
    STEP();
}

/* Python reads them in order; MAX_EVENTS are more than there can be. */
void event_put(struct engine *engine, uint32_t kind, uint32_t index)
{
    uint32_t head = atomic_load_explicit(&engine->event_head, memory_order_relaxed);

    engine->event[head % MAX_EVENTS] = (struct event){ kind, index };
    atomic_store_explicit(&engine->event_head, head + 1, memory_order_release);
    engine->rang = 1;
}

/* Have the request's transfer done by the kernel. Return 0 if that is not possible now. */
static uint32_t transfer(struct engine *engine, uint32_t slot, int fd, const struct iovec *iov, uint32_t count,
                         uint64_t offset, int is_write, int flags)
{
    struct io_uring_sqe *entry = uring_entry(&engine->uring);

    if (!entry)
        return 0;
    if (count == 1) {
        entry->opcode = is_write ? IORING_OP_WRITE : IORING_OP_READ;
        entry->addr = (uint64_t)(uintptr_t)iov->iov_base;
        entry->len = (uint32_t)iov->iov_len;
    } else {
        entry->opcode = is_write ? IORING_OP_WRITEV : IORING_OP_READV;
        entry->addr = (uint64_t)(uintptr_t)iov;
        entry->len = count;
    }
    entry->fd = fd;
    entry->off = offset;
    entry->rw_flags = flags;
    entry->user_data = slot;
    return 1;
}

/* End a request that needs no transfer; it is completed in the next pass. */
static uint32_t ended(struct engine *engine, uint32_t slot, int32_t result)
{
    if (engine->ended_count >= MAX_SLOTS)
        return 0;
    engine->request[slot].result = result;
    engine->ended[engine->ended_count++] = slot;
    return 1;
}

/* Return whether code was translated from the page at an offset in the file, and clear the note. */
static int noted(const struct engine *engine, uint64_t offset)
{
    const struct engine_setup *setup = &engine->setup;

    if (!setup->notes)
        return 0;
    for (uint32_t i = 0; i < setup->region_count; i++) {
        const struct region *region = &setup->region[i];
        if (offset >= region->offset && offset - region->offset < region->size) {
            uint64_t page = (region->gpa + (offset - region->offset)) >> PAGE_SHIFT;
            if (page >= setup->note_pages)
                return 1;
            int found = setup->notes[page];
            if (found)
                setup->notes[page] = 0;
            return found;
        }
    }
    return 1; /* not in guest RAM as it is known: to be on the safe side */
}

/*
 * Record a store into the file of guest RAM, of the kernel or of the device: before the guest gets the answer. The
 * order is that of GuestMemory: the store, the dirty log, a fence, then the check of the notes.
 */
static void stored(struct engine *engine, uint32_t slot, uint64_t offset, uint64_t length)
{
    struct request *request = &engine->request[slot];
    uint64_t end = offset + length;

    if (!length)
        return;
    memset(engine->setup.dirty + (offset >> PAGE_SHIFT), 1, ((end - 1) >> PAGE_SHIFT) - (offset >> PAGE_SHIFT) + 1);
    if (!engine->setup.notes && !request->all_noted)
        return;
    full_fence();
    for (uint64_t at = offset; at < end;) {
        uint64_t next = ((at >> PAGE_SHIFT) + 1) << PAGE_SHIFT;
        uint64_t step = (next < end ? next : end) - at;
        if ((request->all_noted || noted(engine, at)) && request->noted < MAX_NOTED)
            request->range[request->noted++] = (struct range){ at, step };
        at += step;
    }
}

const struct engine_services engine_services = { transfer, queue_transfer, ended, stored };

static void append_answer(struct engine *engine, uint32_t slot, uint64_t now)
{
    struct request *request = &engine->request[slot];
    struct channel *channel = &engine->channel[request->channel];

    request->state = DONE;
    channel->done_number++;
    request_mirror(engine, slot);
    request->next = MAX_SLOTS;
    if (channel->done)
        engine->request[channel->last_done].next = slot;
    else
        channel->first_done = slot, channel->held_since = now;
    channel->last_done = slot;
    channel->done++;
}

static int belongs_here(const struct engine *engine, const struct request *request)
{
    const struct channel *channel = &engine->channel[request->channel];

    return channel->opening == request->opening && channel->owner != OWNER_PYTHON;
}

static void to_python(struct engine *engine, uint32_t slot, uint32_t kind)
{
    engine->request[slot].state = PYTHON;
    request_mirror(engine, slot);
    event_put(engine, kind, slot);
}

/* Let the guest have the answer of a request: through the engine, or through Python if the channel is not here. */
void request_answer(struct engine *engine, uint32_t slot, uint64_t now)
{
    if (belongs_here(engine, &engine->request[slot]))
        append_answer(engine, slot, now);
    else
        to_python(engine, slot, EVENT_ANSWERED);
}

/* Complete a request whose transfer has ended. */
void request_completed(struct engine *engine, uint32_t slot, int32_t result, uint64_t now)
{
    struct request *request = &engine->request[slot];
    struct channel *channel = &engine->channel[request->channel];

    if (request->state != UNDER_WAY)
        return;
    if (channel->opening == request->opening)
        channel->in_flight--;
    atomic_fetch_sub_explicit(&engine->in_flight, 1, memory_order_relaxed);
    request->all_noted = __atomic_load_n(&engine->setup.report_ranges, __ATOMIC_RELAXED);
    request->answer_size = request->device.complete(request->device.context, &engine_services, engine, slot,
                                                    request->packet, result, request->answer);
    if (!request->answer_size || request->answer_size > MAX_ANSWER) {
        to_python(engine, slot, EVENT_RETURNED);
        if (belongs_here(engine, request))
            channel_leave(engine, request->channel);
    } else if (request->noted) {
        to_python(engine, slot, EVENT_NOTED);
    } else {
        request_answer(engine, slot, now);
    }
}

/* Complete what has ended; return how many requests that were. */
uint32_t requests_collect(struct engine *engine, uint64_t now)
{
    struct uring *ring = &engine->uring;
    uint32_t count = engine->ended_count;

    for (uint32_t i = 0; i < count; i++)
        request_completed(engine, engine->ended[i], engine->request[engine->ended[i]].result, now);
    engine->ended_count = 0;
    count += queues_collect(engine, now);
    uring_collect(ring);
    uint32_t head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    for (; head != tail; head++) {
        const struct io_uring_cqe *entry = (const struct io_uring_cqe *)ring->cqes + (head & ring->cq_mask);
        if (entry->user_data == WAKE)
            engine->armed = 0;
        else if (entry->user_data < MAX_SLOTS)
            request_completed(engine, (uint32_t)entry->user_data, entry->res, now), count++;
        else
            queues_event(engine, entry->user_data, entry->res, entry->flags);
    }
    __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    return count;
}
