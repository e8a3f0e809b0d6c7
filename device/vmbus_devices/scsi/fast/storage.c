/* SPDX-License-Identifier: MIT */
/*
 * The two functions by which the engine does plain reads and writes (vmbus/engine_device.h). The checks and the answers
 * are those of the fast path. The engine's thread uses the counters of the units, and nobody else does at that time.
 */
#include <string.h>

#include "fastpath.h"

#define EXPORT __attribute__((visibility("default")))

EXPORT uint32_t storage_take(void *context, const struct engine_services *services, struct engine *engine,
                             uint32_t number, const uint8_t *packet, uint32_t size)
{
    const struct storage *storage = context;
    struct fastpath *path = storage->path;
    struct command command;
    uint16_t type;

    memcpy(&type, packet + DESCRIPTOR_TYPE, sizeof(type));
    if (type != TYPE_GPA_DIRECT || number >= ENGINE_SLOTS)
        return 0;
    struct slot *slot = &path->engine_slot[number];
    struct unit *unit = plan(path, storage->units, packet, size, slot, &command);
    if (!unit)
        return 0;
    if (command.is_write && command.fua && unit->flags & UNIT_LEAVES_FUA)
        return 0;
    uint32_t started;
    if (unit->flags & UNIT_NULL)
        started = services->ended(engine, number, (int32_t)slot->length);
    else if (unit->queue)
        started = services->queue_transfer(engine, number, unit->queue, slot->iov, slot->pieces,
                                           command.lba << unit->block_shift, command.is_write);
    else
        started = services->transfer(engine, number, unit->fd, slot->iov, slot->pieces,
                                     command.lba << unit->block_shift, command.is_write,
                                     command.is_write && command.fua ? (int)unit->fua_flags : 0);
    if (started)
        began(unit);
    return started;
}

EXPORT uint32_t storage_complete(void *context, const struct engine_services *services, struct engine *engine,
                                 uint32_t number, const uint8_t *packet, int32_t result, uint8_t *answer)
{
    struct fastpath *path = ((const struct storage *)context)->path;
    const struct slot *slot = &path->engine_slot[number];
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
