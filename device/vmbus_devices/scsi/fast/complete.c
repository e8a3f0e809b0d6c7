/* SPDX-License-Identifier: MIT */
/* From transfers that have ended to completion packets, or back to Python. */
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

/* Count a request that was done. */
static void count_request(struct unit *unit, const struct slot *slot)
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

/* Write the completion packet of a request that was done, without trailer; return its size. */
static uint32_t build_answer(const struct slot *slot, const uint8_t *packet, uint8_t *answer)
{
    uint8_t *body = answer + DESCRIPTOR_SIZE;
    uint32_t size = (DESCRIPTOR_SIZE + slot->answer_size + 7) & ~7u;

    memset(answer, 0, size);
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

EXPORT uint32_t storage_complete(void *context, const struct engine_services *services, struct engine *engine,
                                 uint32_t number, const uint8_t *packet, int32_t result, uint8_t *answer)
{
    struct fastpath *path = ((const struct storage *)context)->path;
    const struct slot *slot = &path->slot[number];
    struct unit *unit = &path->shared.unit[slot->unit];

    unit->depth--;
    if (!slot->is_write && !(unit->flags & UNIT_NULL))
        for (uint32_t i = 0; i < slot->pieces; i++) /* also where only a part was stored */
            services->stored(engine, number, slot->piece[i].offset, slot->piece[i].length);
    if (result != (int32_t)slot->length)
        return 0;
    count_request(unit, slot);
    return build_answer(slot, packet, answer);
}
