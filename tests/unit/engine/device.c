/* SPDX-License-Identifier: MIT */
/*
 * A device for tests. The payload of a packet begins with what is to be done:
 *
 *      1        complete it at once
 *      2        read `length` bytes at `offset` of the file, into guest RAM at `place`
 *      3        the same through the queue, in two pieces; without a queue as 2
 *      4        as 3, but write
 *      other    leave it to Python
 */
#include <errno.h>
#include <string.h>

#include "engine_device.h"

#define MOST 1024

struct order {
    uint32_t what, length;
    uint64_t offset, place;
};

struct test_device {
    int fd;
    uint32_t queue; /* 0: none */
    uint8_t *ram;
    struct order order[MOST];
    struct iovec iov[MOST][2];
};

static uint32_t payload_at(const uint8_t *packet)
{
    uint16_t offset8;

    memcpy(&offset8, packet + 2, sizeof(offset8));
    return offset8 * 8u;
}

uint32_t test_take(void *context, const struct engine_services *services, struct engine *engine, uint32_t slot,
                   const uint8_t *packet, uint32_t size)
{
    struct test_device *device = context;
    struct order *order = &device->order[slot];
    uint32_t at = payload_at(packet);

    if (at + sizeof(*order) > size)
        return 0;
    memcpy(order, packet + at, sizeof(*order));
    if (order->what == 1)
        return services->ended(engine, slot, 0);
    if (order->what < 2 || order->what > 4)
        return 0;
    struct iovec *iov = device->iov[slot];
    uint8_t *place = device->ram + order->place;
    if (order->what == 2 || !device->queue) {
        iov[0] = (struct iovec){ place, order->length };
        return services->transfer(engine, slot, device->fd, iov, 1, order->offset, order->what == 4, 0);
    }
    iov[0] = (struct iovec){ place, order->length / 2 };
    iov[1] = (struct iovec){ place + order->length / 2, order->length - order->length / 2 };
    return services->queue_transfer(engine, slot, device->queue, iov, 2, order->offset, order->what == 4);
}

uint32_t test_complete(void *context, const struct engine_services *services, struct engine *engine, uint32_t slot,
                       const uint8_t *packet, int32_t result, uint8_t *answer)
{
    const struct order *order = &((struct test_device *)context)->order[slot];
    uint16_t head[4] = { 11, 2, 4, 0 }; /* a completion of 32 bytes */

    if (order->what >= 2) {
        if (order->what != 4)
            services->stored(engine, slot, order->place, order->length);
        if (result != (int32_t)order->length)
            return 0;
    }
    memcpy(answer, head, sizeof(head));
    memcpy(answer + 8, packet + 8, 8);
    memset(answer + 16, 0, 16);
    memcpy(answer + 16, &order->what, sizeof(order->what));
    return 32;
}
