/* SPDX-License-Identifier: MIT */
/* The compiled path: any bytes as the packets of a ring, taken and completed as the engine does. */
#include "engine_stub.h"
#include "fuzz.h"

enum { HEAD = 4, MOST = 16 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint32_t count = 0;

    if (!path)
        open_storage();
    if (size < HEAD)
        return 0;
    const uint8_t *at = data + HEAD, *limit = data + size;
    while (count < MOST && limit - at >= DESCRIPTOR_SIZE + TRAILER_SIZE) {
        uint16_t length8;
        memcpy(&length8, at + DESCRIPTOR_LENGTH8, sizeof(length8));
        size_t length = length8 * 8u;
        if (length < DESCRIPTOR_SIZE || length + TRAILER_SIZE > (size_t)(limit - at))
            break; /* the engine leaves it */
        busy = data[0] >> count % 8 & 1;
        if (!take(count, at, (uint32_t)length))
            break;
        count++;
        at += length + TRAILER_SIZE;
    }
    for (uint32_t i = 0; i < count; i++) {
        int32_t results[] = {(int32_t)request[i].length, -5, 0, (int32_t)(data[3] << 8)};
        complete(i, results[data[2] >> (i % 4 * 2) & 3]);
    }
    if (depth())
        abort();
    return 0;
}
