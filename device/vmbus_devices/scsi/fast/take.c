/* SPDX-License-Identifier: MIT */
/* From packets to transfers. The checks and their order are those of the Python code for the same packet. */
#include <string.h>

#include "fastpath.h"

#define EXPORT __attribute__((visibility("default")))

static uint16_t get16(const uint8_t *at)
{
    uint16_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

static uint32_t get32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

static uint64_t get64(const uint8_t *at)
{
    uint64_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

static uint64_t big(const uint8_t *at, int bytes)
{
    uint64_t value = 0;

    while (bytes--)
        value = value << 8 | *at++;
    return value;
}

/* Parse a READ or WRITE without protection information; return 0 for anything else. */
static int parse_command(const uint8_t *cdb, struct command *command)
{
    uint8_t flags = 0;

    switch (cdb[0]) {
    case OPCODE_READ_6:
    case OPCODE_WRITE_6:
        command->lba = big(cdb + 1, 3) & 0x1fffff;
        command->blocks = cdb[4] ? cdb[4] : 256;
        break;
    case OPCODE_READ_10:
    case OPCODE_WRITE_10:
        flags = cdb[1];
        command->lba = big(cdb + 2, 4);
        command->blocks = big(cdb + 7, 2);
        break;
    case OPCODE_READ_12:
    case OPCODE_WRITE_12:
        flags = cdb[1];
        command->lba = big(cdb + 2, 4);
        command->blocks = big(cdb + 6, 4);
        break;
    case OPCODE_READ_16:
    case OPCODE_WRITE_16:
        flags = cdb[1];
        command->lba = big(cdb + 2, 8);
        command->blocks = big(cdb + 10, 4);
        break;
    default:
        return 0;
    }
    command->is_write = (cdb[0] & 2) != 0; /* in every group of opcodes */
    command->fua = (flags & CDB_FUA) != 0;
    return !(flags & CDB_PROTECT) && command->blocks != 0;
}

/* Find the offset of guest page ``pfn`` in the file of guest RAM; return 0 if the page is not RAM. */
static int locate(const struct fastpath *path, uint64_t pfn, uint64_t *offset)
{
    if (pfn >> (64 - PAGE_SHIFT))
        return 0;
    uint64_t gpa = pfn << PAGE_SHIFT;
    for (uint32_t i = 0; i < path->shared.region_count; i++) {
        const struct region *region = &path->shared.region[i];
        if (gpa >= region->start && gpa < region->end && region->end - gpa >= PAGE) {
            *offset = gpa + (uint64_t)region->delta;
            return *offset + PAGE <= path->shared.ram_size;
        }
    }
    return 0;
}

/* Fill slot->piece and slot->iov with the first slot->length bytes of the range; return 0 if that is not possible. */
static int gather(const struct fastpath *path, struct slot *slot, const uint8_t *pfns, uint32_t inside,
                  uint32_t mask)
{
    uint64_t left = slot->length;
    uint32_t count = 0;

    for (uint32_t i = 0; left; i++) {
        uint64_t offset, step = PAGE - inside < left ? PAGE - inside : left;
        if (!locate(path, get64(pfns + 8 * (uint64_t)i), &offset))
            return 0;
        offset += inside;
        struct piece *last = count ? &slot->piece[count - 1] : NULL;
        if (last && last->offset + last->length == offset)
            last->length += step;
        else
            slot->piece[count++] = (struct piece){offset, step};
        left -= step;
        inside = 0;
    }
    slot->pieces = count;
    for (uint32_t i = 0; i < count; i++) {
        const struct piece *piece = &slot->piece[i];
        if ((piece->offset | piece->length) & mask)
            return 0;
        slot->iov[i] = (struct iovec){path->shared.ram + piece->offset, piece->length};
    }
    return 1;
}

/*
 * Fill ``slot`` and ``command`` with the request in a packet of ``size`` bytes without trailer; return its unit, or NULL
 * if Python has to process the packet. Nothing else is changed.
 */
static struct unit *plan(struct fastpath *path, const int16_t *units, const uint8_t *packet, uint32_t size,
                         struct slot *slot, struct command *command)
{
    uint32_t data = get16(packet + DESCRIPTOR_DATA_OFFSET8) * 8u;
    if (get16(packet + DESCRIPTOR_FLAGS) != 1 || data < DESCRIPTOR_SIZE + GPA_DIRECT_HEADER_SIZE || data > size)
        return NULL;
    uint32_t payload_size = size - data;
    if (payload_size < SHORTEST_REQUEST || payload_size > 128)
        return NULL;
    const uint8_t *header = packet + DESCRIPTOR_SIZE, *range = header + GPA_DIRECT_HEADER_SIZE;
    if (get32(header + GPA_DIRECT_RANGE_COUNT) != 1 ||
        data < DESCRIPTOR_SIZE + GPA_DIRECT_HEADER_SIZE + GPA_RANGE_HEADER_SIZE)
        return NULL;
    uint64_t byte_count = get32(range + GPA_RANGE_BYTE_COUNT);
    uint32_t byte_offset = get32(range + GPA_RANGE_BYTE_OFFSET);
    uint64_t pages = (byte_offset + byte_count + PAGE - 1) >> PAGE_SHIFT;
    if (!byte_count || byte_offset >= PAGE || pages > MAX_PAGES ||
        DESCRIPTOR_SIZE + GPA_DIRECT_HEADER_SIZE + GPA_RANGE_HEADER_SIZE + pages * 8 > data)
        return NULL;

    const uint8_t *request = packet + data;
    if (get32(request + REQUEST_OPERATION) != OPERATION_EXECUTE_SRB || request[REQUEST_PATH] ||
        request[REQUEST_TARGET] >= MAX_TARGETS || request[REQUEST_LUN] >= MAX_LUNS ||
        request[REQUEST_CDB_LENGTH] > CDB_SIZE)
        return NULL;
    int16_t number = units[request[REQUEST_TARGET] * MAX_LUNS + request[REQUEST_LUN]];
    if (number < 0 || number >= MAX_UNITS)
        return NULL;
    struct unit *unit = &path->shared.unit[number];
    if (!parse_command(request + REQUEST_CDB, command) ||
        !(unit->flags & (command->is_write ? UNIT_WRITES : UNIT_READS)) ||
        request[REQUEST_DIRECTION] != (command->is_write ? DIRECTION_OUT : DIRECTION_IN))
        return NULL;
    if (command->blocks > unit->blocks || command->lba > unit->blocks - command->blocks ||
        command->blocks > unit->max_transfer >> unit->block_shift)
        return NULL;
    uint64_t length = command->blocks << unit->block_shift;
    if (length > get32(request + REQUEST_TRANSFER_LENGTH) || length > byte_count)
        return NULL;

    slot->length = (uint32_t)length;
    if (!gather(path, slot, range + GPA_RANGE_HEADER_SIZE, byte_offset, unit->alignment_mask))
        return NULL;
    slot->unit = (uint16_t)number;
    slot->is_write = (uint8_t)command->is_write;
    slot->answer_size = payload_size < LONGEST_ANSWER ? payload_size : LONGEST_ANSWER;
    slot->begun_ns = now_ns();
    memset(slot->request, 0, sizeof(slot->request));
    memcpy(slot->request, request, slot->answer_size);
    return unit;
}

/* Count a request that was started. */
static void began(struct unit *unit)
{
    if (++unit->depth > unit->max_depth)
        unit->max_depth = unit->depth;
}

EXPORT uint32_t storage_take(void *context, const struct engine_services *services, struct engine *engine,
                             uint32_t number, const uint8_t *packet, uint32_t size)
{
    const struct storage *storage = context;
    struct fastpath *path = storage->path;
    struct command command;

    if (get16(packet + DESCRIPTOR_TYPE) != TYPE_GPA_DIRECT || number >= MAX_SLOTS)
        return 0;
    struct slot *slot = &path->slot[number];
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
