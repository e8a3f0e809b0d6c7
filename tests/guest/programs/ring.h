/*
 * A VMBus ring buffer seen from the guest's user space (docs/protocol/rings.md).
 *
 * One `struct ring` is one direction. Sending: ring_put() as often as wanted, then ring_publish(), which says
 * whether the other side has to be signalled; when there was no room, ring_wait_for_room() after that. Receiving: ring_get() as often as wanted, then ring_release(),
 * which says whether the other side waits for the room that was made.
 *
 * The memory is shared with another party: indices are loaded once, checked, then used.
 */
#ifndef RING_H
#define RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define RING_PAGE 4096u
#define PACKET_HEADER 16u
#define PACKET_TRAILER 8u

enum packet_type { PACKET_IN_BAND = 6, PACKET_GPA_DIRECT = 9, PACKET_COMPLETION = 11 };
enum { PACKET_WANTS_COMPLETION = 1 };

/* Words of the control page. */
enum { RING_WRITE, RING_READ, RING_MASK, RING_PENDING };

struct ring {
	volatile uint32_t *control;
	uint8_t *data;
	uint32_t size;  /* bytes of data area */
	uint32_t index; /* our own index: of the next byte to write, or to read */
	uint32_t published;
	uint32_t wanted; /* bytes that the last ring_put() had no room for */
};

struct packet {
	uint16_t type;
	uint16_t offset8; /* of the payload, in units of 8 bytes */
	uint16_t length8; /* of all but the trailer */
	uint16_t flags;
	uint64_t transaction_id;
};

static inline uint32_t ring_load(const struct ring *ring, int word)
{
	return __atomic_load_n(&ring->control[word], __ATOMIC_ACQUIRE);
}

static inline void ring_store(struct ring *ring, int word, uint32_t value)
{
	__atomic_store_n(&ring->control[word], value, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* `bytes` with the control page. `writer`: whether we write to this ring. */
static inline void ring_attach(struct ring *ring, void *base, size_t bytes, bool writer)
{
	ring->control = base;
	ring->data = (uint8_t *)base + RING_PAGE;
	ring->size = (uint32_t)(bytes - RING_PAGE);
	ring->index = ring_load(ring, writer ? RING_WRITE : RING_READ);
	ring->published = ring->index;
	ring->wanted = 0;
}

static inline bool ring_index_ok(const struct ring *ring, uint32_t index)
{
	return index < ring->size && index % 8 == 0;
}

static inline uint32_t ring_distance(const struct ring *ring, uint32_t from, uint32_t to)
{
	return to >= from ? to - from : to + ring->size - from;
}

/* Bytes that may be written; 8 always stay unused, or full would look like empty. */
static inline uint32_t ring_room(const struct ring *ring, uint32_t read, uint32_t write)
{
	return ring->size - 8 - ring_distance(ring, read, write);
}

static inline uint32_t ring_advance(const struct ring *ring, uint32_t index, uint32_t bytes)
{
	index += bytes;
	return index >= ring->size ? index - ring->size : index;
}

static inline void ring_copy_in(struct ring *ring, const void *bytes, size_t length)
{
	size_t first = ring->size - ring->index;

	if (first > length)
		first = length;
	memcpy(ring->data + ring->index, bytes, first);
	memcpy(ring->data, (const uint8_t *)bytes + first, length - first);
	ring->index = ring_advance(ring, ring->index, (uint32_t)length);
}

static inline void ring_copy_out(struct ring *ring, void *bytes, size_t length)
{
	size_t first = ring->size - ring->index;

	if (first > length)
		first = length;
	memcpy(bytes, ring->data + ring->index, first);
	memcpy((uint8_t *)bytes + first, ring->data, length - first);
	ring->index = ring_advance(ring, ring->index, (uint32_t)length);
}

static inline uint32_t ring_padded(size_t bytes)
{
	return (uint32_t)((bytes + 7) & ~(size_t)7);
}

/*
 * Puts one packet behind the published ones: its header, `extension` (the ranges of a GPA-direct packet), then
 * two pieces of payload. 1: done. 0: no room. -1: the ring is corrupt, or the packet can never fit.
 */
static inline int ring_put(struct ring *ring, uint16_t type, uint16_t flags, uint64_t transaction_id,
			   const void *extension, size_t extension_length, const void *head, size_t head_length,
			   const void *body, size_t body_length)
{
	static const uint8_t zeros[8];
	uint32_t payload = ring_padded(head_length + body_length);
	uint32_t total = PACKET_HEADER + ring_padded(extension_length) + payload;
	uint32_t start = ring->index, read = ring_load(ring, RING_READ);
	uint32_t trailer[2] = { 0, start };
	struct packet packet = {
		.type = type,
		.offset8 = (uint16_t)((PACKET_HEADER + ring_padded(extension_length)) / 8),
		.length8 = (uint16_t)(total / 8),
		.flags = flags,
		.transaction_id = transaction_id,
	};

	if (!ring_index_ok(ring, read) || total + PACKET_TRAILER > ring->size - 8 || total / 8 > UINT16_MAX)
		return -1;
	if (total + PACKET_TRAILER > ring_room(ring, read, start)) {
		ring->wanted = total + PACKET_TRAILER;
		return 0;
	}
	ring_copy_in(ring, &packet, sizeof packet);
	ring_copy_in(ring, extension, extension_length);
	ring_copy_in(ring, zeros, ring_padded(extension_length) - extension_length);
	ring_copy_in(ring, head, head_length);
	ring_copy_in(ring, body, body_length);
	ring_copy_in(ring, zeros, payload - head_length - body_length);
	ring_copy_in(ring, trailer, sizeof trailer);
	return 1;
}

/* Shows what was put to the other side. Whether it has to be signalled: it was idle, and wants to be told. */
static inline bool ring_publish(struct ring *ring)
{
	uint32_t old = ring->published;

	if (ring->index == old)
		return false;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	ring_store(ring, RING_WRITE, ring->index);
	ring->published = ring->index;
	return ring_load(ring, RING_MASK) == 0 && ring_load(ring, RING_READ) == old;
}

/*
 * Asks the other side for a signal once the packet that did not fit will; only after ring_publish(), or the other
 * side reckons with more room than there is and stays silent. Whether there is room by now (do not sleep then).
 */
static inline bool ring_wait_for_room(struct ring *ring)
{
	ring_store(ring, RING_PENDING, ring->wanted);
	return ring_room(ring, ring_load(ring, RING_READ), ring->index) >= ring->wanted;
}

static inline void ring_room_came(struct ring *ring)
{
	if (ring->wanted)
		ring_store(ring, RING_PENDING, 0);
	ring->wanted = 0;
}

static inline bool ring_empty(const struct ring *ring)
{
	return ring_load(ring, RING_WRITE) == ring->index;
}

/*
 * Copies the next packet's payload to `buffer`. 1: done, `length` bytes. 0: the ring is empty. -1: corrupt, or
 * `capacity` is too small; the trailer is checked as well, which a guest's kernel does not do.
 */
static inline int ring_get(struct ring *ring, struct packet *packet, void *buffer, size_t capacity, size_t *length)
{
	uint32_t write = ring_load(ring, RING_WRITE), start = ring->index, available, trailer[2];

	if (!ring_index_ok(ring, write))
		return -1;
	available = ring_distance(ring, start, write);
	if (available == 0)
		return 0;
	if (available < PACKET_HEADER + PACKET_TRAILER)
		return -1;
	ring_copy_out(ring, packet, sizeof *packet);
	if (packet->offset8 != 2 || packet->length8 < 2 || packet->flags & ~PACKET_WANTS_COMPLETION ||
	    packet->length8 * 8u + PACKET_TRAILER > available || packet->length8 * 8u - PACKET_HEADER > capacity)
		return -1;
	*length = packet->length8 * 8u - PACKET_HEADER;
	ring_copy_out(ring, buffer, *length);
	ring_copy_out(ring, trailer, sizeof trailer);
	if (trailer[0] != 0 || trailer[1] != start)
		return -1;
	return 1;
}

/* Gives the room of what was got back. Whether the other side waits for just that. */
static inline bool ring_release(struct ring *ring)
{
	uint32_t old = ring->published, pending, write, before, after;

	if (ring->index == old)
		return false;
	ring_store(ring, RING_READ, ring->index);
	ring->published = ring->index;
	pending = ring_load(ring, RING_PENDING) & ~7u;
	write = ring_load(ring, RING_WRITE);
	if (pending == 0 || !ring_index_ok(ring, write))
		return false;
	before = ring_room(ring, old, write);
	after = ring_room(ring, ring->index, write);
	return before < pending && after >= pending;
}

#endif
