/*
 * Requests to a storage controller in the hands of a user program: sending one, waiting for its completion, and the
 * handshake after which it takes commands (docs/protocol/devices.md#storage-handshake).
 */
#ifndef STORVSC_H
#define STORVSC_H

#include "uio_link.h"

#define SCSI_GUID "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"
#define PACKET 64u

static void put32(uint8_t *at, uint32_t value)
{
	memcpy(at, &value, sizeof value);
}

static uint32_t get32(const uint8_t *at)
{
	uint32_t value;

	memcpy(&value, at, sizeof value);
	return value;
}

static void send_packet(struct link *link, uint16_t type, uint16_t flags, uint64_t id, const void *extension,
			size_t extension_length, const uint8_t *payload, size_t length)
{
	if (ring_put(&link->tx, type, flags, id, extension, extension_length, payload, length, NULL, 0) != 1)
		fail("no room for packet %llu", (unsigned long long)id);
	if (ring_publish(&link->tx))
		link_signal(link);
}

/* Waits for the completion of `id`; what it says is in `answer`. */
static void wait_for(struct link *link, uint64_t id, uint8_t *answer)
{
	struct packet packet;
	size_t length = 0;
	int got;

	memset(answer, 0, PACKET);
	while ((got = ring_get(&link->rx, &packet, answer, PACKET, &length)) == 0)
		link_wait(link);
	if (got < 0)
		fail("the host's ring is corrupt");
	if (ring_release(&link->rx))
		link_signal(link);
	if (packet.type != PACKET_COMPLETION || packet.transaction_id != id)
		fail("packet of type %u, transaction %llu, where the completion of %llu was wanted", packet.type,
		     (unsigned long long)packet.transaction_id, (unsigned long long)id);
}

static void handshake(struct link *link)
{
	static const uint32_t operations[] = { 7, 9, 10, 8 };

	for (size_t step = 0; step < 4; step++) {
		uint8_t packet[PACKET] = { 0 }, answer[PACKET];

		put32(packet, operations[step]);
		put32(packet + 4, 1);
		if (operations[step] == 9)
			put32(packet + 12, 0x0602);
		send_packet(link, PACKET_IN_BAND, PACKET_WANTS_COMPLETION, step + 1, NULL, 0, packet, PACKET);
		wait_for(link, step + 1, answer);
		if (get32(answer) != 1 || get32(answer + 8) != 0)
			fail("operation %u is answered with status %#x", operations[step], get32(answer + 8));
	}
}

#endif
