/* SPDX-License-Identifier: MIT */
/*
 * Plain reads and writes of disks, from a guest's ring to the file and back, without Python.
 *
 *   take()   packets of a private copy of a ring --check--> submission entries of an io_uring
 *   submit() hands them to the kernel
 *   reap()   completion entries --> pages are marked, answers are built; or the packet is given back
 *
 * Whatever is not a READ or WRITE of which everything is as usual is left in the copy: Python takes it, and is the only
 * one who refuses anything. So nothing here decides what a guest is told, but for "it is done". What a packet says is
 * read from the private copy only, and checked before it is used.
 *
 * One thread calls all of it. The layouts in layout.h are made from the construct declarations.
 */
#ifndef FASTPATH_H
#define FASTPATH_H

#include <stdint.h>
#include <sys/uio.h>

#include "layout.h"

#define FASTPATH_VERSION 2
#define MAX_REGIONS 8
#define MAX_UNITS 256
#define MAX_SLOTS 512
#define MAX_EVENTS 512
#define MAX_PAGES 513 /* 2 MiB that begin within a page */
#define MAX_NOTED 4096
#define MAX_BUCKETS 256
#define BUCKET_BIAS 128 /* bucket of a second; 4 buckets an octave */
#define ANSWER_STRIDE 96

#define PAGE_SHIFT 12
#define PAGE ((uint64_t)1 << PAGE_SHIFT)

struct region { /* guest RAM: [start, end) lies at start + delta in the file */
    uint64_t start, end;
    int64_t delta;
};

enum { UNIT_READS = 1, UNIT_WRITES = 2, UNIT_NULL = 4 };

struct unit { /* shared with Python */
    int32_t fd;
    uint32_t flags;
    uint64_t blocks;
    uint32_t block_shift;
    uint32_t max_transfer; /* bytes */
    uint32_t alignment_mask;
    uint32_t through_flags; /* of pwritev2, for FUA */
    /* what happened since Python looked */
    uint64_t reads, writes, bytes_read, bytes_written;
    uint32_t depth, most_depth;
    uint64_t least_ns, greatest_ns;
    uint32_t buckets[MAX_BUCKETS];
};

enum { EVENT_ANSWER = 0, EVENT_GIVEN_BACK = 1 };

struct event { /* shared with Python */
    uint32_t channel;
    uint32_t kind;
    uint32_t offset; /* in the output */
    uint32_t length;
};

struct noted { /* a range in a page that code was translated from; shared with Python */
    uint64_t gpa;
    uint64_t length;
};

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
    /* shared with Python, in this order */
    uint32_t version;
    uint32_t in_flight;
    uint32_t events;
    uint32_t noted_ranges;
    uint32_t region_count;
    int32_t event_fd;
    uint8_t *ram;
    uint64_t ram_size;
    uint8_t *dirty; /* a byte a page of the file */
    uint8_t *notes; /* a byte a guest page; NULL: code is not watched */
    uint64_t note_pages;
    uint64_t spin_ns;      /* longest look for a completion */
    uint64_t idle_spin_ns; /* and for a packet, with no transfer under way */
    struct region region[MAX_REGIONS];
    struct unit unit[MAX_UNITS];
    struct event event[MAX_EVENTS];
    struct noted noted[MAX_NOTED];
    uint8_t output[MAX_EVENTS * ANSWER_STRIDE];
    /* private */
    struct uring uring;
    uint32_t first_free;
    uint32_t waiting[MAX_EVENTS]; /* slots of null units: done already */
    uint32_t waiting_count;
    uint64_t usual_ns; /* how long a transfer takes, by and by */
    struct slot slot[MAX_SLOTS];
};

/* fastpath.c */
struct fastpath *fastpath_open(void);
void fastpath_close(struct fastpath *path);
uint64_t fastpath_size(void);
uint64_t now_ns(void);

/* take.c */
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
const uint8_t *fastpath_packet(const struct fastpath *path, uint32_t number);
uint32_t fastpath_reap(struct fastpath *path);
uint32_t fastpath_wait(struct fastpath *path, const uint32_t *word, uint32_t value);
uint32_t fastpath_arm(struct fastpath *path, uint32_t on);

#endif
