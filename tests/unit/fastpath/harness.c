/* SPDX-License-Identifier: MIT */
/* Packets that are nearly right, under the sanitizers; requests end out of order, and with any result. */
#include <stdio.h>

#include "engine_stub.h"

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

static void end(uint32_t slot, uint64_t *answers, uint64_t *returned)
{
    int32_t length = (int32_t)request[slot].length, bad[] = {-5, 0, 511, 1 << 30};

    ++*(complete(slot, next() % 4 ? length : bad[next() % 4]) ? answers : returned);
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 0) : 10000, answers = 0, returned = 0, taken = 0;

    state = argc > 2 ? strtoull(argv[2], NULL, 0) : 88172645463325252u;
    open_storage();
    for (uint64_t round = 0; round < rounds; round++) {
        uint8_t packet[8192];
        uint32_t slot = next() % MAX_SLOTS, size = build(packet, round);
        if (request[slot].length)
            end(slot, &answers, &returned);
        if (next() % 2)
            for (uint32_t flips = 1 + next() % 4; flips; flips--)
                packet[next() % size] ^= (uint8_t)(1u << next() % 8);
        if (next() % 4 == 0) /* the engine passes no packet that is shorter than its descriptor */
            size = DESCRIPTOR_SIZE + (uint32_t)(next() % (size - DESCRIPTOR_SIZE + 1)) / 8 * 8;
        busy = next() % 16 == 0;
        taken += (uint64_t)take(slot, packet, size);
    }
    for (uint32_t slot = 0; slot < MAX_SLOTS; slot++)
        if (request[slot].length)
            end(slot, &answers, &returned);
    printf("{\"taken\": %llu, \"answers\": %llu, \"returned\": %llu, \"depth\": %u}\n", (unsigned long long)taken,
           (unsigned long long)answers, (unsigned long long)returned, depth());
    fastpath_close(path);
    return 0;
}
