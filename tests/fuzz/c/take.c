/* SPDX-License-Identifier: MIT */
/*
 * The compiled path: any bytes as the packets of a ring, each in exactly as much memory as it takes, as the engine takes
 * and completes them. Stands for the engine: what it asks of the functions, and what they may ask of it.
 */
#include <stdlib.h>
#include <string.h>

#include "fastpath.h"
#include "fuzz.h"

enum { RAM = 1 << 20, HOLE = 192 * 4096, HIGH = 1 << 24, BLOCKS = 512, HEAD = 4, MOST = 16, ANSWER = 128 };

static struct fastpath *path;
static struct storage storage;
static uint8_t ram[RAM];
static int16_t units[MAX_TARGETS * MAX_LUNS];
static struct { uint8_t *packet; int64_t length, stored; int is_write, unstored; } request[MOST];

static void begin(uint32_t slot, int64_t length, int is_write, int unstored)
{
    if (slot >= MOST || request[slot].length || length <= 0)
        abort();
    request[slot].length = length;
    request[slot].is_write = is_write;
    request[slot].unstored = unstored;
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
        const uint8_t *at = iov[i].iov_base;
        if (at < ram || !iov[i].iov_len || iov[i].iov_len > RAM || at + iov[i].iov_len > ram + RAM)
            abort();
        length += iov[i].iov_len;
    }
    if (offset > BLOCKS * 512 || length > BLOCKS * 512 - offset)
        abort();
    begin(slot, (int64_t)length, is_write, 0);
    return 1;
}

static uint32_t queue_transfer(struct engine *engine, uint32_t slot, uint32_t queue, const struct iovec *iov,
                               uint32_t count, uint64_t offset, int is_write)
{
    if (queue != 7)
        abort();
    return transfer(engine, slot, -1, iov, count, offset, is_write, 0);
}

static uint32_t ended(struct engine *engine, uint32_t slot, int32_t result)
{
    (void)engine;
    begin(slot, result, 0, 1);
    return 1;
}

static void stored(struct engine *engine, uint32_t slot, uint64_t offset, uint64_t length)
{
    (void)engine;
    if (offset > RAM || length > RAM - offset || request[slot].is_write || request[slot].unstored)
        abort();
    request[slot].stored += (int64_t)length;
}

static const struct engine_services services = {
    .transfer = transfer, .queue_transfer = queue_transfer, .ended = ended, .stored = stored};

static void prepare(void)
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
    for (int16_t i = 0; i < 3; i++) { /* without a file, with one, in a queue */
        path->shared.unit[i] = (struct unit){.fd = i ? 3 : -1,
                                      .flags = UNIT_READS | UNIT_WRITES | (i ? 0 : UNIT_NULL),
                                      .queue = i == 2 ? 7 : 0,
                                      .blocks = BLOCKS,
                                      .block_shift = 9,
                                      .max_transfer = 1 << 18};
        units[i] = i;
    }
    storage = (struct storage){path, units};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint32_t count = 0;

    if (!path)
        prepare();
    if (size < HEAD)
        return 0;
    const uint8_t *at = data + HEAD, *limit = data + size;
    while (count < MOST && limit - at >= DESCRIPTOR_SIZE + TRAILER_SIZE) {
        uint16_t length8;
        memcpy(&length8, at + DESCRIPTOR_LENGTH8, sizeof(length8));
        size_t length = length8 * 8u;
        if (length < DESCRIPTOR_SIZE || length + TRAILER_SIZE > (size_t)(limit - at))
            break; /* the engine leaves it */
        uint8_t *packet = malloc(length); /* one byte too far is seen */
        memcpy(packet, at, length);
        request[count].length = 0;
        if (!storage_take(&storage, &services, NULL, count, packet, (uint32_t)length)) {
            if (request[count].length)
                abort();
            free(packet);
            break;
        }
        if (!request[count].length)
            abort();
        request[count++].packet = packet;
        at += length + TRAILER_SIZE;
    }
    for (uint32_t i = 0; i < count; i++) {
        int32_t results[] = {(int32_t)request[i].length, -5, 0, (int32_t)(data[3] << 8)};
        int32_t result = results[data[2] >> (i % 4 * 2) & 3];
        uint8_t *answer = malloc(ANSWER);
        uint32_t bytes = storage_complete(&storage, &services, NULL, i, request[i].packet, result, answer);
        if (bytes > ANSWER || bytes % 8 || (bytes != 0) != (result == (int32_t)request[i].length))
            abort();
        if (!request[i].is_write && !request[i].unstored && request[i].stored != request[i].length)
            abort();
        free(answer);
        free(request[i].packet);
    }
    for (int i = 0; i < 3; i++)
        if (path->shared.unit[i].depth)
            abort();
    return 0;
}
