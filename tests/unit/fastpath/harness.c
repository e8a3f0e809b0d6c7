/* SPDX-License-Identifier: MIT */
/* Packets that are nearly right, in exactly as much memory as they take, under the sanitizers. */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fastpath.h"

enum { RAM = 1 << 20, HOLE = 192 * 4096, HIGH = 1 << 24, BLOCKS = 512 };

static uint64_t state;

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

static uint32_t packet(uint8_t *at, uint64_t transaction)
{
    uint32_t blocks = 1 + next() % 40, length = blocks * 512, offset = next() % 3 ? 0 : next() % 4096 & ~511u;
    uint32_t pages = (offset + length + 4095) / 4096, data = 16 + 8 + 8 + pages * 8, size = data + 64;
    int write = next() % 2;

    memset(at, 0, size + 8);
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
    uint8_t *request = at + data;
    put(request + REQUEST_OPERATION, OPERATION_EXECUTE_SRB, 4);
    request[REQUEST_LUN] = next() % 3;
    request[REQUEST_CDB_LENGTH] = 10;
    request[REQUEST_DIRECTION] = write ? DIRECTION_OUT : DIRECTION_IN;
    put(request + REQUEST_TRANSFER_LENGTH, length, 4);
    uint8_t *cdb = request + REQUEST_CDB;
    cdb[0] = write ? 0x2a : 0x28;
    uint32_t lba = next() % BLOCKS;
    cdb[4] = lba >> 8;
    cdb[5] = lba & 0xff;
    cdb[8] = blocks;
    return size + 8;
}

static uint32_t reap(struct fastpath *path, uint64_t *answers, uint64_t *returned)
{
    uint32_t count = fastpath_wait(path, NULL, 0);

    for (uint32_t i = 0; i < count; i++) {
        if (path->shared.event[i].kind == EVENT_ANSWER)
            ++*answers;
        else if (fastpath_packet(path, path->shared.event[i].offset))
            ++*returned;
    }
    return count;
}

/* Wait until no more than ``left`` are under way, as an event loop does. */
static int drain(struct fastpath *path, uint32_t left, uint64_t *answers, uint64_t *returned)
{
    while (path->shared.in_flight > left) {
        struct pollfd event = {.fd = path->shared.event_fd, .events = POLLIN};
        uint64_t count;
        if (!fastpath_arm(path, 1)) {
            if (poll(&event, 1, 20000) <= 0)
                return 0;
            if (read(path->shared.event_fd, &count, sizeof(count)) < 0)
                return 0;
        }
        fastpath_arm(path, 0);
        reap(path, answers, returned);
    }
    return 1;
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : 10000, answers = 0, returned = 0, taken = 0;
    char name[] = "fastpath-harness-XXXXXX";

    state = argc > 2 ? strtoull(argv[2], NULL, 0) : 88172645463325252u;
    struct fastpath *path = fastpath_open();
    if (!path)
        return 77;
    int made = mkstemp(name), fd = open(name, O_RDONLY); /* its writes fail, and are given back */
    unlink(name);
    if (made < 0 || fd < 0 || ftruncate(made, BLOCKS * 512) < 0)
        return 1;
    close(made);
    path->shared.ram = malloc(RAM);
    memset(path->shared.ram, 0, RAM);
    path->shared.ram_size = RAM;
    path->shared.dirty = calloc(1, RAM >> 12);
    path->shared.notes = calloc(1, RAM >> 12);
    path->shared.note_pages = RAM >> 12;
    path->shared.region_count = 2;
    path->shared.region[0] = (struct region){0, HOLE, 0};
    path->shared.region[1] = (struct region){HIGH, HIGH + RAM - HOLE, (int64_t)HOLE - HIGH};
    for (int i = 0; i < 2; i++)
        path->shared.unit[i] = (struct unit){.fd = i ? fd : -1,
                                      .flags = UNIT_READS | UNIT_WRITES | (i ? 0 : UNIT_NULL),
                                      .blocks = BLOCKS,
                                      .block_shift = 9,
                                      .max_transfer = 1 << 18};
    int16_t units[MAX_TARGETS * MAX_LUNS];
    memset(units, 0xff, sizeof(units));
    units[0] = 0;
    units[1] = 1;

    for (uint64_t round = 0; round < rounds; round++) {
        uint8_t scratch[8192];
        uint32_t length = 0, packets = 1 + next() % 3;
        for (uint32_t i = 0; i < packets; i++)
            length += packet(scratch + length, round);
        if (next() % 2)
            for (uint32_t flips = 1 + next() % 4; flips; flips--)
                scratch[next() % length] ^= (uint8_t)(1u << next() % 8);
        if (next() % 4 == 0)
            length = 1 + next() % length;
        uint8_t *copy = malloc(length); /* one byte too far is seen */
        memcpy(copy, scratch, length);
        uint64_t consumed = 0, known = next() % 4 ? length : next() % (length + 64);
        if (known > length)
            known = length;
        uint32_t count = fastpath_take(path, 3, units, copy, length, 0, known, 8, &consumed);
        if (consumed > known || count > 8)
            return 1;
        taken += count;
        free(copy);
        if (fastpath_submit(path) < 0)
            return 1;
        path->shared.notes[next() % (RAM >> 12)] = 1;
        if (next() % 4 == 0)
            reap(path, &answers, &returned);
        if (path->shared.in_flight > MAX_SLOTS / 2 && !drain(path, MAX_SLOTS / 4, &answers, &returned))
            return 1;
    }
    if (!drain(path, 0, &answers, &returned))
        return 1;
    printf("{\"taken\": %llu, \"answers\": %llu, \"returned\": %llu, \"in_flight\": %u, \"depth\": %u}\n",
           (unsigned long long)taken, (unsigned long long)answers, (unsigned long long)returned,
           path->shared.in_flight, path->shared.unit[0].depth + path->shared.unit[1].depth);
    free(path->shared.ram);
    free(path->shared.dirty);
    free(path->shared.notes);
    close(fd);
    fastpath_close(path);
    return 0;
}
