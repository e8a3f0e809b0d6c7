/* SPDX-License-Identifier: MIT */
/* What lives as long as the fast path does. */
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "fastpath.h"

#define EXPORT __attribute__((visibility("default")))

uint64_t now_ns(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

/* Bytes that Python and C share at the start of the structure; they must agree. */
EXPORT uint64_t fastpath_size(void)
{
    return offsetof(struct fastpath, uring);
}

EXPORT struct fastpath *fastpath_open(void)
{
    /* Pages that are never touched are never there: most slots never see a long request. */
    struct fastpath *path =
        mmap(NULL, sizeof(*path), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (path == MAP_FAILED)
        return NULL;
    path->version = FASTPATH_VERSION;
    path->event_fd = -1;
    if (uring_open(&path->uring) < 0) {
        munmap(path, sizeof(*path));
        return NULL;
    }
    path->event_fd = path->uring.event_fd;
    for (uint32_t i = 0; i < MAX_SLOTS; i++)
        path->slot[i].next_free = i + 1;
    path->first_free = 0;
    return path;
}

EXPORT void fastpath_close(struct fastpath *path)
{
    uring_close(&path->uring);
    munmap(path, sizeof(*path));
}
