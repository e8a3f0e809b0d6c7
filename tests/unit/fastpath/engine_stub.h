/* SPDX-License-Identifier: MIT */
/*
 * The engine, as the storage functions see it: what they ask of it is checked, and done without a kernel. A guest with
 * RAM in two pieces, and a controller whose units are nothing, a file, and a queue.
 */
#ifndef ENGINE_STUB_H
#define ENGINE_STUB_H

#include <stdlib.h>
#include <string.h>

#include "fastpath.h"

enum { RAM = 1 << 20, HOLE = 192 * 4096, HIGH = 1 << 24, BLOCKS = 512, UNITS = 3, QUEUE = 7, ANSWER = 128 };

/* A request; `length` is 0 unless it is under way. */
struct under_way {
    uint8_t *packet;
    int64_t length, stored;
    int stores; /* a read from a file */
};

static uint8_t ram[RAM];
static int busy; /* the next transfer is not possible now */
static struct under_way request[MAX_SLOTS];
static struct fastpath *path;
static struct storage storage;
static int16_t units[MAX_TARGETS * MAX_LUNS];

static void begin(uint32_t slot, int64_t length, int stores)
{
    if (slot >= MAX_SLOTS || request[slot].length || length <= 0)
        abort();
    request[slot].length = length;
    request[slot].stores = stores;
    request[slot].stored = 0;
}

static uint32_t transfer(struct engine *engine, uint32_t slot, int fd, const struct iovec *iov, uint32_t count,
                         uint64_t offset, int is_write, int flags)
{
    uint64_t length = 0;

    (void)engine, (void)fd, (void)flags;
    if (!count || count > MAX_PAGES)
        abort();
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *at = iov[i].iov_base;
        if (at < ram || !iov[i].iov_len || iov[i].iov_len > RAM || at + iov[i].iov_len > ram + RAM)
            abort();
        if (!is_write)
            at[0] = at[iov[i].iov_len - 1] = 0x5a;
        length += iov[i].iov_len;
    }
    if (offset > BLOCKS * 512 || length > BLOCKS * 512 - offset)
        abort();
    if (busy)
        return 0;
    begin(slot, (int64_t)length, !is_write);
    return 1;
}

static uint32_t queue_transfer(struct engine *engine, uint32_t slot, uint32_t queue, const struct iovec *iov,
                               uint32_t count, uint64_t offset, int is_write)
{
    if (queue != QUEUE)
        abort();
    return transfer(engine, slot, -1, iov, count, offset, is_write, 0);
}

static uint32_t ended(struct engine *engine, uint32_t slot, int32_t result)
{
    (void)engine;
    begin(slot, result, 0);
    return 1;
}

static void stored(struct engine *engine, uint32_t slot, uint64_t offset, uint64_t length)
{
    (void)engine;
    if (offset > RAM || length > RAM - offset || !request[slot].stores)
        abort();
    request[slot].stored += (int64_t)length;
}

static const struct engine_services services = {
    .transfer = transfer, .queue_transfer = queue_transfer, .ended = ended, .stored = stored};

static void open_storage(void)
{
    path = fastpath_open();
    if (!path)
        abort();
    path->shared.ram = ram;
    path->shared.ram_size = RAM;
    path->shared.region_count = 2;
    path->shared.region[0] = (struct region){0, HOLE, 0};
    path->shared.region[1] = (struct region){HIGH, HIGH + RAM - HOLE, (int64_t)HOLE - HIGH};
    memset(units, 0xff, sizeof(units));
    for (int16_t i = 0; i < UNITS; i++) {
        path->shared.unit[i] = (struct unit){.fd = i ? 3 : -1,
                                      .flags = UNIT_READS | UNIT_WRITES | (i ? 0 : UNIT_NULL),
                                      .queue = i == 2 ? QUEUE : 0,
                                      .blocks = BLOCKS,
                                      .block_shift = 9,
                                      .max_transfer = 1 << 18};
        units[i] = i;
    }
    storage = (struct storage){path, units};
}

/* Take a packet, of which a copy in exactly as much memory is kept: one byte too far is seen. 0: it was left. */
static int take(uint32_t slot, const uint8_t *packet, uint32_t size)
{
    uint8_t *copy = malloc(size);

    memcpy(copy, packet, size);
    uint32_t taken = storage_take(&storage, &services, NULL, slot, copy, size);
    if ((taken != 0) != (request[slot].length != 0))
        abort();
    request[slot].packet = taken ? copy : NULL;
    if (!taken)
        free(copy);
    return taken != 0;
}

/* End a request that was taken; return whether it was answered. */
static int complete(uint32_t slot, int32_t result)
{
    struct under_way *each = &request[slot];
    uint8_t *answer = malloc(ANSWER);

    uint32_t size = storage_complete(&storage, &services, NULL, slot, each->packet, result, answer);
    if (size > ANSWER || size % 8 || (size != 0) != (result == each->length))
        abort();
    if (each->stores && each->stored != each->length)
        abort();
    free(answer);
    free(each->packet);
    *each = (struct under_way){ 0 };
    return size != 0;
}

static uint32_t depth(void)
{
    uint32_t total = 0;

    for (int i = 0; i < UNITS; i++)
        total += path->shared.unit[i].depth;
    return total;
}

#endif
