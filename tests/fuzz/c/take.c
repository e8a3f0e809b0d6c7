/* SPDX-License-Identifier: MIT */
/* The compiled path: any bytes as the copy of a ring, in exactly as much memory as they take. */
#include <stdlib.h>
#include <string.h>

#include "fastpath.h"
#include "fuzz.h"

enum { RAM = 1 << 20, HOLE = 192 * 4096, HIGH = 1 << 24, BLOCKS = 512, HEAD = 4 };

static struct fastpath *path;
static uint8_t ram[RAM], dirty[RAM >> 12], notes[RAM >> 12];
static int16_t units[MAX_TARGETS * MAX_LUNS];

static void prepare(void)
{
    path = fastpath_open();
    if (!path)
        exit(77); /* no io_uring for this process */
    path->shared.ram = ram;
    path->shared.ram_size = RAM;
    path->shared.dirty = dirty;
    path->shared.notes = notes;
    path->shared.note_pages = RAM >> 12;
    path->shared.region_count = 2;
    path->shared.region[0] = (struct region){0, HOLE, 0};
    path->shared.region[1] = (struct region){HIGH, HIGH + RAM - HOLE, (int64_t)HOLE - HIGH};
    path->shared.unit[0] = (struct unit){.fd = -1,
                                  .flags = UNIT_READS | UNIT_WRITES | UNIT_NULL,
                                  .blocks = BLOCKS,
                                  .block_shift = 9,
                                  .max_transfer = 1 << 18};
    memset(units, 0xff, sizeof(units));
    units[0] = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!path)
        prepare();
    if (size < HEAD)
        return 0;
    uint64_t length = size - HEAD, consumed = 0;
    uint64_t at = (data[0] | (uint64_t)data[1] << 8) % (length + 9);
    uint64_t known = at > length ? 0 : length - at;
    if (data[2] & 1)
        known = known ? data[2] % (known + 1) : 0;
    uint32_t limit = 1 + data[3] % 16;
    uint8_t *copy = malloc(length ? length : 1); /* one byte too far is seen */
    memcpy(copy, data + HEAD, length);
    uint32_t count = fastpath_take(path, 3, units, copy, length, at, known, limit, &consumed);
    free(copy);
    if (consumed > known || count > limit)
        abort();
    if (fastpath_submit(path) < 0)
        abort();
    for (uint32_t found = 0; found < count;) {
        uint32_t events = fastpath_wait(path, NULL, 0);
        if (!events || path->shared.events > MAX_EVENTS)
            abort();
        found += events;
    }
    if (path->shared.in_flight)
        abort();
    return 0;
}
