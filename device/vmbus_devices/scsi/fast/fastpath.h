/* SPDX-License-Identifier: MIT */
/*
 * Ordinary reads and writes of disks, from a guest's ring to the file and back, without Python: what the engine
 * (engine_device.h) calls for the packets of a storage controller.
 *
 *   storage_take()      a packet --check--> a transfer
 *   storage_complete()  a transfer that has ended --> pages are marked dirty, the completion packet is built;
 *                       one that failed is returned to Python instead
 *
 * A packet that is anything but a valid READ or WRITE without special conditions is left, and Python processes it: only
 * Python refuses packets and reports errors to the guest, this code reports nothing but success. Fields are read from
 * a private copy of the packet only, and checked before use.
 *
 * Both functions are called in the engine's thread, which uses the units while a channel is given to it, and nobody
 * else does at that time. layout.h is generated: the constants and offsets of packets from the declarations in
 * vmbus.wire, the structures shared with Python (region, unit, shared) from shared.py.
 */
#ifndef FASTPATH_H
#define FASTPATH_H

#include <stdint.h>
#include <sys/uio.h>

#include "engine_device.h"
#include "layout.h"

#define MAX_SLOTS 1024 /* requests under way: those of the engine */
#define MAX_PAGES 513 /* 2 MiB that begin within a page */

#define PAGE ((uint64_t)1 << PAGE_SHIFT)

struct piece {
    uint64_t offset; /* in the file of guest RAM */
    uint64_t length;
};

struct slot {
    uint16_t unit;
    uint8_t is_write;
    uint32_t length; /* bytes */
    uint32_t answer_size;
    uint32_t pieces;
    uint64_t begun_ns;
    uint8_t request[LONGEST_ANSWER];
    struct piece piece[MAX_PAGES];
    struct iovec iov[MAX_PAGES];
};

struct fastpath {
    struct shared shared; /* with Python */
    struct slot slot[MAX_SLOTS]; /* private */
};

/* A controller's part of the fast path, the context of the functions below; shared with Python. */
struct storage {
    struct fastpath *path;
    const int16_t *units; /* target * MAX_LUNS + LUN to the number of a unit, or -1 */
};

struct command {
    int is_write, fua;
    uint64_t lba, blocks;
};

/* fastpath.c */
struct fastpath *fastpath_open(void);
void fastpath_close(struct fastpath *path);
uint64_t fastpath_size(void);
uint64_t now_ns(void);

/* take.c */
uint32_t storage_take(void *context, const struct engine_services *services, struct engine *engine, uint32_t number,
                      const uint8_t *packet, uint32_t size);

/* complete.c */
uint32_t storage_complete(void *context, const struct engine_services *services, struct engine *engine,
                          uint32_t number, const uint8_t *packet, int32_t result, uint8_t *answer);

#endif
