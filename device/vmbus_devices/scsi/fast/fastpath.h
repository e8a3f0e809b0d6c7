/* SPDX-License-Identifier: MIT */
/*
 * Ordinary reads and writes of disks, from a guest's ring to the file and back, without Python.
 *
 *   fastpath_take()    packets of a private copy of a ring --check--> submission entries of an io_uring
 *   fastpath_submit()  passes the entries to the kernel
 *   fastpath_reap()    completion entries --> pages are marked dirty, completion packets are built;
 *                      a transfer that failed is returned to Python instead
 *
 * A packet that is anything but a valid READ or WRITE without special conditions stays in the copy, and Python
 * processes it: only Python refuses packets and reports errors to the guest, this code reports nothing but success.
 * Fields are read from the private copy only, and checked before use.
 *
 * All functions are called from one thread. layout.h is generated: the constants and offsets of packets from the
 * declarations in vmbus.wire, the structures shared with Python (region, unit, event, noted, shared) from shared.py.
 */
#ifndef FASTPATH_H
#define FASTPATH_H

#include <stdint.h>
#include <sys/uio.h>

#include "engine_device.h"
#include "layout.h"

#define MAX_SLOTS 512 /* requests under way */
#define ENGINE_SLOTS 1024 /* of the engine */
#define MAX_PAGES 513 /* 2 MiB that begin within a page */

#define PAGE ((uint64_t)1 << PAGE_SHIFT)

struct piece {
    uint64_t offset; /* in the file of guest RAM */
    uint64_t length;
};

struct slot {
    uint32_t channel;
    uint16_t unit;
    uint8_t is_write;
    uint8_t in_use;
    uint32_t length; /* bytes */
    uint32_t packet_size, answer_size;
    uint32_t pieces;
    uint32_t next_free;
    uint64_t begun_ns;
    uint8_t request[LONGEST_ANSWER];
    uint8_t packet[16 + 16 + MAX_PAGES * 8 + 64 + 64];
    struct piece piece[MAX_PAGES];
    struct iovec iov[MAX_PAGES];
};

struct uring {
    int fd, event_fd;
    void *sq_map, *cq_map, *sqe_map;
    uint64_t sq_size, cq_size, sqe_size;
    uint32_t *sq_tail, *sq_flags, *cq_head, *cq_tail, *cq_flags;
    uint32_t sq_mask, cq_mask, sq_entries, tail, unsubmitted;
    void *cqes;
};

struct fastpath {
    struct shared shared; /* with Python */
    /* private */
    struct uring uring;
    uint32_t first_free;
    uint32_t waiting[MAX_EVENTS]; /* slots of units without a file: their requests have ended already */
    uint32_t waiting_count;
    uint64_t usual_ns; /* moving average of the duration of a transfer */
    struct slot slot[MAX_SLOTS];
    struct slot engine_slot[ENGINE_SLOTS]; /* the engine's thread uses these, and the units; nothing else */
};

/* A channel's part of the fast path, for the engine; shared with Python. */
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
struct unit *plan(struct fastpath *path, const int16_t *units, const uint8_t *packet, uint32_t size, struct slot *slot,
                  struct command *command);
void began(struct unit *unit);
uint32_t fastpath_take(struct fastpath *path, uint32_t channel, const int16_t *units, const uint8_t *buffer,
                       uint64_t length, uint64_t at, uint64_t known, uint32_t limit, uint64_t *consumed);

/* uring.c */
int uring_open(struct uring *ring);
void uring_close(struct uring *ring);
int uring_put(struct uring *ring, const struct slot *slot, uint32_t number, const struct unit *unit, uint64_t offset,
              uint32_t flags);
int uring_ready(const struct uring *ring);
void uring_collect(const struct uring *ring);
int fastpath_submit(struct fastpath *path);

/* reap.c */
uint32_t build_answer(const struct slot *slot, const uint8_t *packet, uint8_t *answer);
void count_request(struct unit *unit, const struct slot *slot);
const uint8_t *fastpath_packet(const struct fastpath *path, uint32_t number);
uint32_t fastpath_reap(struct fastpath *path);
uint32_t fastpath_wait(struct fastpath *path, const uint32_t *word, uint32_t value);
uint32_t fastpath_arm(struct fastpath *path, uint32_t on);

#endif
