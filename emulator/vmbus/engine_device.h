/* SPDX-License-Identifier: MIT */
/*
 * What a device brings to the engine, and what it may use there: all that the compiled code of a device needs to
 * know. It is a library of its own; Python passes the addresses of its two functions.
 */
#ifndef ENGINE_DEVICE_H
#define ENGINE_DEVICE_H

#include <stdint.h>
#include <sys/uio.h>

struct engine;

struct engine_services {
    /* Let the kernel do the transfer of a request; `iov` stays as it is until then. 0: not possible now. */
    uint32_t (*transfer)(struct engine *engine, uint32_t slot, int fd, const struct iovec *iov, uint32_t count,
                         uint64_t offset, int is_write, int flags);
    /*
     * Let the server of a queue do it. `iov` lies in the file of guest RAM, and need not stay. 0: not possible now,
     * or the server has ended.
     */
    uint32_t (*queue_transfer)(struct engine *engine, uint32_t slot, uint32_t queue, const struct iovec *iov,
                               uint32_t count, uint64_t offset, int is_write);
    /* End a request that needs no transfer; it is completed in the same pass. 0: not possible now. */
    uint32_t (*ended)(struct engine *engine, uint32_t slot, int32_t result);
    /* Record a store into the file of guest RAM, before the guest gets the answer of this request. */
    void (*stored)(struct engine *engine, uint32_t slot, uint64_t offset, uint64_t length);
};

/* Both functions are called in the engine's thread, one at a time, and do not wait. */
struct engine_device {
    /*
     * Start the request of a packet with transfer(), queue_transfer() or ended(). `packet`: a private copy of `size`
     * bytes, which stays until the request is answered. 0: nothing was started, and Python has to process the packet.
     */
    uint32_t (*take)(void *context, const struct engine_services *services, struct engine *engine, uint32_t slot,
                     const uint8_t *packet, uint32_t size);
    /*
     * Write the answer of a request that has ended, a packet without trailer of at most 128 bytes, and return its
     * size; `result`: bytes transferred, or minus an errno. 0: Python has to process the packet.
     */
    uint32_t (*complete)(void *context, const struct engine_services *services, struct engine *engine, uint32_t slot,
                         const uint8_t *packet, int32_t result, uint8_t *answer);
    void *context;
};

#endif
