/* SPDX-License-Identifier: MIT */
/*
 * Packets that are nearly right, in exactly as much memory as they take, under the sanitizers: the two functions as the
 * engine calls them, which here keeps the requests for a while and ends them out of order, with any result.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastpath.h"

enum { RAM = 1 << 20, HOLE = 192 * 4096, HIGH = 1 << 24, BLOCKS = 512, ANSWER = 128 };

/* A request under way. */
struct engine {
    uint8_t *packet;
    uint64_t length;
    int is_write, in_use;
    int64_t stored;
};

static uint64_t state;
static uint8_t *ram;
static struct engine request[MAX_SLOTS];

static uint64_t next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void put(uint8_t *at, uint64_t value, int bytes)
{
    memcpy(at, &value, (size_t)bytes);
}

static uint32_t build(uint8_t *at, uint64_t transaction)
{
    uint32_t blocks = 1 + next() % 40, length = blocks * 512, offset = next() % 3 ? 0 : next() % 4096 & ~511u;
    uint32_t pages = (offset + length + 4095) / 4096, data = 16 + 8 + 8 + pages * 8, size = data + 64;
    int write = next() % 2;

    memset(at, 0, size);
    put(at, TYPE_GPA_DIRECT, 2);
    put(at + 2, data / 8, 2);
    put(at + 4, size / 8, 2);
    put(at + 6, 1, 2);
    put(at + 8, transaction, 8);
    put(at + 20, 1, 4);
    put(at + 24, length, 4);
    put(at + 28, offset, 4);
    for (uint32_t i = 0; i < pages; i++)
        put(at + 32 + 8 * i, next() % 8 ? next() % 192 : (HIGH >> 12) + next() % 66, 8);
    uint8_t *srb = at + data;
    put(srb + REQUEST_OPERATION, OPERATION_EXECUTE_SRB, 4);
    srb[REQUEST_LUN] = next() % 3;
    srb[REQUEST_CDB_LENGTH] = 10;
    srb[REQUEST_DIRECTION] = write ? DIRECTION_OUT : DIRECTION_IN;
    put(srb + REQUEST_TRANSFER_LENGTH, length, 4);
    uint8_t *cdb = srb + REQUEST_CDB;
    cdb[0] = write ? 0x2a : 0x28;
    uint32_t lba = next() % BLOCKS;
    cdb[4] = lba >> 8;
    cdb[5] = lba & 0xff;
    cdb[8] = blocks;
    return size;
}

/* --- the engine's services: every byte of a transfer is touched, every address checked --- */

static void begin(uint32_t slot, uint64_t length, int is_write)
{
    if (slot >= MAX_SLOTS || request[slot].in_use)
        abort();
    request[slot].in_use = 1;
    request[slot].length = length;
    request[slot].is_write = is_write;
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
        if (at < ram || iov[i].iov_len > RAM || at + iov[i].iov_len > ram + RAM)
            abort();
        if (is_write)
            for (size_t j = 0; j < iov[i].iov_len; j++)
                state += at[j];
        else
            memset(at, 0x5a, iov[i].iov_len);
        length += iov[i].iov_len;
    }
    if (offset + length > BLOCKS * 512)
        abort();
    if (next() % 16 == 0)
        return 0; /* not now */
    begin(slot, length, is_write);
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
    if (result <= 0)
        abort();
    begin(slot, (uint64_t)result, 1); /* nothing is stored for a unit without a file */
    return 1;
}

static void stored(struct engine *engine, uint32_t slot, uint64_t offset, uint64_t length)
{
    (void)engine;
    if (offset > RAM || length > RAM - offset || request[slot].is_write)
        abort();
    request[slot].stored += (int64_t)length;
}

static const struct engine_services services = {
    .transfer = transfer, .queue_transfer = queue_transfer, .ended = ended, .stored = stored};

static void end(struct storage *storage, uint32_t slot, uint64_t *answers, uint64_t *returned)
{
    struct engine *each = &request[slot];
    int32_t bad[] = {-5, 0, 511, 1 << 30}, result = next() % 4 ? (int32_t)each->length : bad[next() % 4];
    uint8_t *answer = malloc(ANSWER);

    uint32_t size = storage_complete(storage, &services, NULL, slot, each->packet, result, answer);
    if (size > ANSWER || size % 8 || (size != 0) != (result == (int32_t)each->length))
        abort();
    if (!each->is_write && each->stored != (int64_t)each->length)
        abort();
    ++*(size ? answers : returned);
    free(answer);
    free(each->packet);
    each->packet = NULL;
    each->in_use = 0;
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : 10000, answers = 0, returned = 0, taken = 0, depth = 0;
    int16_t units[MAX_TARGETS * MAX_LUNS];

    state = argc > 2 ? strtoull(argv[2], NULL, 0) : 88172645463325252u;
    struct fastpath *path = fastpath_open();
    if (!path)
        return 1;
    ram = calloc(1, RAM);
    path->shared.ram = ram;
    path->shared.ram_size = RAM;
    path->shared.region_count = 2;
    path->shared.region[0] = (struct region){0, HOLE, 0};
    path->shared.region[1] = (struct region){HIGH, HIGH + RAM - HOLE, (int64_t)HOLE - HIGH};
    for (uint32_t i = 0; i < 3; i++) /* without a file, with one, in a queue */
        path->shared.unit[i] = (struct unit){.fd = i ? 3 : -1,
                                      .flags = UNIT_READS | UNIT_WRITES | (i ? 0 : UNIT_NULL),
                                      .queue = i == 2 ? 7 : 0,
                                      .blocks = BLOCKS,
                                      .block_shift = 9,
                                      .max_transfer = 1 << 18};
    memset(units, 0xff, sizeof(units));
    for (int16_t i = 0; i < 3; i++)
        units[i] = i;
    struct storage storage = {path, units};

    for (uint64_t round = 0; round < rounds; round++) {
        uint8_t scratch[8192];
        uint32_t slot = next() % MAX_SLOTS, size = build(scratch, round);
        if (request[slot].in_use)
            end(&storage, slot, &answers, &returned);
        if (next() % 2)
            for (uint32_t flips = 1 + next() % 4; flips; flips--)
                scratch[next() % size] ^= (uint8_t)(1u << next() % 8);
        if (next() % 4 == 0)
            size = DESCRIPTOR_SIZE + next() % (size - DESCRIPTOR_SIZE + 1) / 8 * 8; /* the engine's least */
        uint8_t *packet = malloc(size); /* one byte too far is seen */
        memcpy(packet, scratch, size);
        if (storage_take(&storage, &services, NULL, slot, packet, size)) {
            if (!request[slot].in_use)
                abort();
            request[slot].packet = packet;
            taken++;
        } else {
            if (request[slot].in_use)
                abort();
            free(packet);
        }
    }
    for (uint32_t slot = 0; slot < MAX_SLOTS; slot++)
        if (request[slot].in_use)
            end(&storage, slot, &answers, &returned);
    for (int i = 0; i < 3; i++)
        depth += path->shared.unit[i].depth;
    printf("{\"taken\": %llu, \"answers\": %llu, \"returned\": %llu, \"depth\": %llu}\n", (unsigned long long)taken,
           (unsigned long long)answers, (unsigned long long)returned, (unsigned long long)depth);
    free(ram);
    fastpath_close(path);
    return 0;
}
