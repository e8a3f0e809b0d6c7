/* SPDX-License-Identifier: MIT */
/*
 * The rings of a channel, and signals to its guest. The rules are those of vmbus.bus.io.ring; where the guest breaks
 * one, the channel is left, and Python finds the reason when it reads the ring itself.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "engine.h"

#define TAKE_LIMIT 64

static uint32_t *word(const struct engine *engine, const struct ring *ring, uint32_t offset)
{
    return (uint32_t *)(engine->setup.ram + ring->page[0] + offset);
}

static uint32_t load(const struct engine *engine, const struct ring *ring, uint32_t offset)
{
    return __atomic_load_n(word(engine, ring, offset), __ATOMIC_ACQUIRE);
}

static void store(struct engine *engine, const struct ring *ring, uint32_t offset, uint32_t value)
{
    __atomic_store_n(word(engine, ring, offset), value, __ATOMIC_RELEASE);
    engine->setup.dirty[ring->page[0] >> PAGE_SHIFT] = 1;
}

static void copy_out(const struct engine *engine, const struct ring *ring, uint32_t at, uint8_t *to, uint32_t length)
{
    while (length) {
        uint32_t inside = at & (PAGE - 1), step = (uint32_t)PAGE - inside < length ? (uint32_t)PAGE - inside : length;
        memcpy(to, engine->setup.ram + ring->page[1 + (at >> PAGE_SHIFT)] + inside, step);
        to += step;
        length -= step;
        at += step;
        at = at == ring->size ? 0 : at;
    }
}

static void copy_in(struct engine *engine, const struct ring *ring, uint32_t at, const uint8_t *from, uint32_t length)
{
    while (length) {
        uint32_t inside = at & (PAGE - 1), step = (uint32_t)PAGE - inside < length ? (uint32_t)PAGE - inside : length;
        uint64_t page = ring->page[1 + (at >> PAGE_SHIFT)];
        memcpy(engine->setup.ram + page + inside, from, step);
        engine->setup.dirty[page >> PAGE_SHIFT] = 1;
        from += step;
        length -= step;
        at += step;
        at = at == ring->size ? 0 : at;
    }
}

void channel_leave(struct engine *engine, uint32_t number)
{
    struct channel *channel = &engine->channel[number];

    if (channel->owner != OWNER_ENGINE)
        return;
    signal_settle(engine, channel);
    channel->owner = OWNER_LEFT;
    channel_mirror(engine, number);
    event_put(engine, EVENT_LEFT, number);
}

/* ---- signals ---- */

/* Ask QEMU for the interrupt; it stays owed while Python writes to the socket, or QEMU is too busy to read. */
static void send_line(struct engine *engine, struct channel *channel)
{
    channel->line_owed = 1;
    uint64_t ahead = atomic_load_explicit(&engine->lines_limit, memory_order_acquire) -
                     atomic_load_explicit(&engine->lines, memory_order_relaxed);
    if (ahead <= LINES_AHEAD / 2 && !atomic_exchange(&engine->lines_told, 1))
        event_put(engine, EVENT_LINES, 0);
    if (!ahead || pthread_mutex_trylock(&engine->line_lock) != 0)
        return;
    /* Counted first: nobody may see an answer to a line that does not count yet. */
    atomic_fetch_add(&engine->lines, 1);
    ssize_t sent = send(engine->setup.qtest_fd, channel->line, channel->line_length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && (errno == EAGAIN || errno == EINTR)) {
        atomic_fetch_sub(&engine->lines, 1);
    } else {
        channel->line_owed = 0;
        engine->counts.sent++;
    }
    pthread_mutex_unlock(&engine->line_lock);
}

void signal_guest(struct engine *engine, struct channel *channel, int may_wait)
{
    channel->counts.signals++;
    uint32_t before = signals_set_bits(channel->flag, channel->flag_bit);
    engine->setup.dirty[channel->flag_page] = 1;
    if (before & channel->flag_bit)
        return;
    if (!may_wait || !engine->setup.policy.wait_for_halt || now_ns() < engine->quiet_until_ns) {
        if (signals_post(&channel->vcpu, channel->vector))
            engine->counts.left_to_vcpu++;
        else
            send_line(engine, channel);
        return;
    }
    /* As signals_post(), but a vCPU that runs gets a moment to halt. */
    uint64_t *pending = &channel->vcpu.pending[channel->vector / 64 % 4];
    __atomic_fetch_or(pending, (uint64_t)1 << channel->vector % 64, __ATOMIC_SEQ_CST);
    uint32_t idle = __atomic_load_n(channel->vcpu.idle, __ATOMIC_SEQ_CST);
    if (idle == VCPU_POLLING)
        engine->counts.left_to_vcpu++;
    else if (idle == VCPU_RUNNING)
        channel->waits_since = now_ns();
    else if (signals_take_back(&channel->vcpu, channel->vector)) {
        __atomic_fetch_add(channel->vcpu.missed, 1, __ATOMIC_RELAXED);
        send_line(engine, channel);
    }
}

static void stop_waiting(struct engine *engine, struct channel *channel)
{
    channel->waits_since = 0;
    if (signals_take_back(&channel->vcpu, channel->vector))
        send_line(engine, channel);
    else
        engine->counts.left_to_vcpu++;
}

/* Look after a vector that waits for its vCPU to halt, and after an interrupt that QEMU could not take. */
void signal_look(struct engine *engine, struct channel *channel, uint64_t now)
{
    if (channel->line_owed)
        send_line(engine, channel);
    if (!channel->waits_since)
        return;
    uint64_t left = __atomic_load_n(&channel->vcpu.pending[channel->vector / 64 % 4], __ATOMIC_ACQUIRE);
    if (!(left >> channel->vector % 64 & 1) ||
        __atomic_load_n(channel->vcpu.idle, __ATOMIC_ACQUIRE) == VCPU_HALTED ||
        (int64_t)(now - channel->waits_since) > (int64_t)engine->setup.policy.wait_for_halt ||
        now < engine->quiet_until_ns)
        stop_waiting(engine, channel);
}

/* Leave no vector behind: the channel is about to be Python's. */
void signal_settle(struct engine *engine, struct channel *channel)
{
    if (channel->waits_since)
        stop_waiting(engine, channel);
}

/* ---- guest to host ---- */

void rings_mask(struct engine *engine, struct channel *channel, uint32_t masked)
{
    if (channel->masked != masked) {
        channel->masked = masked;
        store(engine, &channel->in, RING_MASK, masked);
    }
}

/* Free the room of what was taken, and signal a guest that waits for it. */
static void commit(struct engine *engine, struct channel *channel, uint32_t number, uint32_t before)
{
    uint32_t size = channel->in.size, index = channel->in.index;

    channel_mirror(engine, number);
    store(engine, &channel->in, RING_READ, index);
    STEP();
    full_fence();
    uint32_t wanted = load(engine, &channel->in, RING_PENDING) & ~7u;
    if (!wanted || !(load(engine, &channel->in, RING_FEATURES) & FEATURE_PENDING_SEND_SIZE))
        return;
    uint32_t write = load(engine, &channel->in, RING_WRITE);
    if (write >= size || write & 7)
        return; /* found by the next pass */
    uint32_t room_before = (before + size - write - RING_RESERVED) % size;
    uint32_t room = (index + size - write - RING_RESERVED) % size;
    if (room_before < wanted && wanted <= room)
        signal_guest(engine, channel, 0);
}

/* Start the request of a packet of `size` bytes at the channel's index; return 0 if it is not plain, -1: no room. */
static int take_one(struct engine *engine, struct channel *channel, uint32_t number, const uint8_t *descriptor,
                    uint32_t size)
{
    if (engine->uring.unsubmitted >= engine->uring.sq_entries || engine->ended_count >= MAX_SLOTS)
        return -1;
    uint32_t slot = request_new(engine);
    if (slot >= MAX_SLOTS)
        return -1;
    struct request *request = &engine->request[slot];
    memcpy(request->packet, descriptor, DESCRIPTOR_SIZE);
    copy_out(engine, &channel->in, (channel->in.index + DESCRIPTOR_SIZE) % channel->in.size,
             request->packet + DESCRIPTOR_SIZE, size - DESCRIPTOR_SIZE);
    request->channel = number;
    request->opening = channel->opening;
    request->device = channel->device;
    request->size = size;
    request->begun_ns = now_ns();
    if (!channel->device.take(channel->device.context, &engine_services, engine, slot, request->packet, size)) {
        request_free(engine, slot);
        return 0;
    }
    request->state = TAKEN;
    channel->outstanding++;
    request->taken_number = ++channel->taken_number;
    request_mirror(engine, slot);
    request->state = UNDER_WAY;
    channel->in_flight++;
    atomic_fetch_add_explicit(&engine->in_flight, 1, memory_order_relaxed);
    return 1;
}

/* Take plain packets; return how many. A packet that is not plain, or a damaged ring, ends the engine's ownership. */
uint32_t rings_take(struct engine *engine, uint32_t number)
{
    struct channel *channel = &engine->channel[number];
    struct ring *ring = &channel->in;
    uint32_t write = load(engine, ring, RING_WRITE), before = ring->index, count = 0, left = 0;

    if (write == ring->index || channel->blocked)
        return 0;
    if (write >= ring->size || write & 7) {
        channel_leave(engine, number);
        return 0;
    }
    uint32_t known = (write + ring->size - ring->index) % ring->size;
    while (known && count < TAKE_LIMIT && !left) {
        uint8_t descriptor[DESCRIPTOR_SIZE];
        uint16_t length8;
        if (known < DESCRIPTOR_SIZE + TRAILER_SIZE) {
            left = 1;
            break;
        }
        copy_out(engine, ring, ring->index, descriptor, DESCRIPTOR_SIZE);
        memcpy(&length8, descriptor + DESCRIPTOR_LENGTH8, sizeof(length8));
        uint32_t size = length8 * 8u, total = size + TRAILER_SIZE;
        if (size < DESCRIPTOR_SIZE || size > MAX_PACKET || total > known) {
            left = 1;
            break;
        }
        int taken = take_one(engine, channel, number, descriptor, size);
        if (taken <= 0) {
            left = !taken;
            break;
        }
        ring->index = (ring->index + total) % ring->size;
        known -= total;
        channel->counts.bytes_in += total;
        count++;
    }
    channel->counts.packets_in += count;
    if (count)
        commit(engine, channel, number, before);
    if (left)
        channel_leave(engine, number);
    return count;
}

/* ---- host to guest ---- */

/* Write the first `limit` answers, as far as they fit, visible to the guest all at once. */
static void write_answers(struct engine *engine, struct channel *channel, uint32_t limit)
{
    uint32_t number = (uint32_t)(channel - engine->channel);
    struct ring *ring = &channel->out;
    uint32_t old = ring->index, at = old, count = 0, slot = channel->first_done, bytes = 0;
    uint32_t read = load(engine, ring, RING_READ);

    if (read >= ring->size || read & 7) {
        channel_leave(engine, number);
        return;
    }
    uint32_t room = (read + ring->size - old - RING_RESERVED) % ring->size;
    for (; count < limit; count++) {
        const struct request *request = &engine->request[slot];
        uint8_t packet[MAX_ANSWER + TRAILER_SIZE];
        uint32_t total = request->answer_size + TRAILER_SIZE;
        uint64_t trailer = (uint64_t)at << 32;
        if (total > room)
            break;
        memcpy(packet, request->answer, request->answer_size);
        memcpy(packet + request->answer_size, &trailer, TRAILER_SIZE);
        copy_in(engine, ring, at, packet, total);
        at = (at + total) % ring->size;
        room -= total;
        bytes += total;
        slot = request->next;
    }
    channel->blocked = 0;
    if (count == limit && channel->room_asked) {
        channel->room_asked = 0;
        store(engine, ring, RING_PENDING, 0);
    }
    if (count < limit) {
        uint32_t wanted = (engine->request[slot].answer_size + TRAILER_SIZE + 7) & ~7u;
        channel->room_asked = 1;
        store(engine, ring, RING_PENDING, wanted);
        full_fence();
        read = load(engine, ring, RING_READ);
        if (read < ring->size && (read + ring->size - at - RING_RESERVED) % ring->size < wanted) {
            channel->blocked = 1;
            channel->counts.ring_full++;
        }
    }
    if (!count)
        return;
    STEP();
    ring->index = at;
    store(engine, ring, RING_WRITE, at);
    STEP();
    channel->answered_number += count;
    channel_mirror(engine, number);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t next = engine->request[channel->first_done].next;
        request_free(engine, channel->first_done);
        channel->first_done = next;
    }
    channel->done -= count;
    channel->counts.packets_out += count;
    channel->counts.bytes_out += bytes;
    full_fence();
    if (load(engine, ring, RING_MASK) == 0 && load(engine, ring, RING_READ) == old)
        signal_guest(engine, channel, 1);
}

/*
 * Give the guest answers now, or hold them back so that it and the back end work at the same time: half of what it
 * waits for, when it has read everything and idles.
 */
void rings_deliver(struct engine *engine, struct channel *channel, uint64_t now)
{
    const struct policy *policy = &engine->setup.policy;
    uint32_t count = channel->done, total = count + channel->in_flight;

    if (!count)
        return;
    if (total > policy->at_once && policy->hold && now >= engine->quiet_until_ns) {
        int late = (int64_t)(now - channel->held_since) > (int64_t)policy->hold;
        uint32_t idle = __atomic_load_n(channel->vcpu.idle, __ATOMIC_RELAXED);
        if (idle == VCPU_RUNNING)
            channel->idle_since = 0;
        else if (!channel->idle_since)
            channel->idle_since = now;
        if (!late && (idle == VCPU_RUNNING || load(engine, &channel->out, RING_READ) != channel->out.index))
            return;
        if (!late && count * 2 < total && now - channel->idle_since < policy->gather)
            return;
        if (count > (total + 1) / 2)
            count = (total + 1) / 2;
    }
    write_answers(engine, channel, count);
    channel->held_since = now;
}
