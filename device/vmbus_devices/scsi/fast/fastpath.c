/* SPDX-License-Identifier: MIT */
/* Creation and destruction of the fast path. */
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

/* Return the size of the shared structure, which Python compares with its own. */
EXPORT uint64_t fastpath_size(void)
{
    return sizeof(struct shared);
}

EXPORT struct fastpath *fastpath_open(void)
{
    /* NORESERVE: pages are allocated when first touched, and most slots never hold a long request. */
    struct fastpath *path =
        mmap(NULL, sizeof(*path), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (path == MAP_FAILED)
        return NULL;
    path->shared.version = FASTPATH_VERSION;
    return path;
}

EXPORT void fastpath_close(struct fastpath *path)
{
    munmap(path, sizeof(*path));
}
