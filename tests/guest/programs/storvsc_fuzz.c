/*
 * Speaks to a storage controller as no driver would, through uio_hv_generic: damaged requests that have to be
 * answered, then one packet or index that makes the channel fail; close, open, and again.
 *
 *     storvsc_fuzz EPOCHS REQUESTS SEED
 *
 * The buffer has pages on both sides that no request names; they have to stay as they are. Prints one line of JSON;
 * exit status 0: every request was answered once, and the guards are whole. What is written goes to the first blocks
 * of the first disk.
 */
#include "storvsc.h"

#define DATA_PAGE 1u /* the guards are pages 0 and 3 */
#define DATA_BYTES (2 * RING_PAGE)
#define GUARD 0xA5

static uint64_t state;
static uint64_t good, checked, invalid, other;

static uint32_t random_below(uint32_t limit)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 32) % limit;
}

/* A request with one or two things wrong with it. The length of its extension; 0: there is no buffer. */
static size_t make_request(const struct link *link, uint8_t *packet, uint64_t *extension)
{
	static const uint8_t opcodes[] = { 0x00, 0x03, 0x08, 0x0A, 0x12, 0x1A, 0x25, 0x28, 0x28, 0x2A, 0x2A, 0x2F, 0x35,
					   0x41, 0x42, 0x5A, 0x5E, 0x5F, 0x88, 0x8A, 0x93, 0x9E, 0xA0, 0xA8, 0xAA, 0xFF };
	static const uint64_t outside[] = { 1ull << 20, 1ull << 40, (1ull << 52) - 1, ~0ull, 1ull << 63 };
	uint32_t blocks = random_below(17), count, offset, ranges = 1, pages;
	uint8_t *cdb = packet + 28;
	size_t words = 1;

	memset(packet, 0, PACKET);
	put32(packet, 3);
	put32(packet + 4, 1);
	packet[12] = 0x34;
	cdb[0] = opcodes[random_below(sizeof opcodes)];
	if (cdb[0] >> 5 == 4 || cdb[0] >> 5 == 5)
		cdb[13 - (cdb[0] >> 5 == 5) * 4] = (uint8_t)blocks;
	else
		cdb[8] = (uint8_t)blocks;
	cdb[5] = (uint8_t)random_below(8);
	for (uint32_t damage = random_below(3); damage; damage--)
		cdb[1 + random_below(15)] = (uint8_t)random_below(256);
	packet[17] = random_below(20) ? 0 : (uint8_t)random_below(256);
	packet[18] = random_below(20) ? 0 : (uint8_t)random_below(256);
	packet[19] = random_below(20) ? 0 : (uint8_t)random_below(256);
	packet[20] = random_below(10) ? 16 : (uint8_t)random_below(256);
	packet[21] = 20;
	packet[22] = (uint8_t)(random_below(10) ? random_below(3) : random_below(256));
	if (cdb[0] == 0x0A || cdb[0] == 0x2A || cdb[0] == 0x8A || cdb[0] == 0xAA)
		packet[22] = random_below(5) ? 0 : packet[22];
	if (!random_below(6))
		return 0;
	count = random_below(3) ? blocks * 512 : random_below(DATA_BYTES + 1);
	offset = random_below(4) ? 0 : random_below(RING_PAGE);
	if (offset + count > DATA_BYTES)
		offset = 0;
	pages = (offset + count + RING_PAGE - 1) / RING_PAGE;
	put32(packet + 24, random_below(10) ? count : random_below(2) ? 0xFFFFFFFF : random_below(1 << 20));
	if (!random_below(20))
		count = random_below(2) ? 0xFFFFFFFF : random_below(1 << 24); /* more than the pages hold */
	if (!random_below(20))
		offset = random_below(2) ? 0xFFFFFFFF : RING_PAGE + random_below(1 << 20);
	if (!random_below(40))
		pages = random_below(40); /* too few, or too many */
	if (!random_below(40))
		ranges = 1 + random_below(4);
	extension[0] = (uint64_t)ranges << 32; /* reserved, number of ranges */
	for (uint32_t range = 0; range < ranges; range++) {
		extension[words++] = (uint64_t)offset << 32 | count;
		for (uint32_t page = 0; page < pages; page++)
			extension[words++] = buffer_pfn(link, DATA_PAGE + page % 2);
		if (!random_below(10) && pages)
			extension[words - 1 - random_below(pages)] = outside[random_below(5)];
	}
	return words * 8;
}

/* Something after which the host hears no more on this channel; it stops reading, or answers and goes on. */
static void break_channel(struct link *link, uint64_t id)
{
	uint8_t packet[PACKET] = { 0 };
	uint64_t extension[2] = { random_below(2) ? 0xFFFFFFFFull << 32 : 0, 0 };

	put32(packet, 3);
	put32(packet + 4, 1);
	switch (random_below(7)) {
	case 0: /* an operation that there is not */
		put32(packet, 15 + random_below(1 << 30));
		send_packet(link, PACKET_IN_BAND, PACKET_WANTS_COMPLETION, id, NULL, 0, packet, PACKET);
		break;
	case 1: /* shorter than any packet */
		send_packet(link, PACKET_IN_BAND, PACKET_WANTS_COMPLETION, id, NULL, 0, packet, 8 * random_below(2));
		break;
	case 2: /* without a completion */
		send_packet(link, PACKET_IN_BAND, 0, id, NULL, 0, packet, PACKET);
		break;
	case 3: /* ranges without end, or none */
		send_packet(link, PACKET_GPA_DIRECT, PACKET_WANTS_COMPLETION, id, extension, sizeof extension, packet,
			    PACKET);
		break;
	case 4: /* a packet of no kind */
		send_packet(link, (uint16_t)(100 + random_below(60000)), PACKET_WANTS_COMPLETION, id, NULL, 0, packet,
			    PACKET);
		break;
	case 5: /* an index outside the ring */
		ring_store(&link->tx, RING_WRITE, link->tx.size + 8 * random_below(1 << 20));
		link_signal(link);
		break;
	default: /* a packet longer than what is there */
		memset(link->tx.data, 0xFF, link->tx.size);
		ring_store(&link->tx, RING_WRITE, ring_advance(&link->tx, link->tx.index, 64));
		link_signal(link);
	}
}

/*
 * Wait until the host's interrupt mask for our packets has a value, or all packets are taken if it is to be 1. Return
 * false after `seconds`.
 */
static bool wait_for_mask(const struct link *link, uint32_t value, int seconds)
{
	uint64_t end = now_ns() + (uint64_t)seconds * 1000000000u;

	while (ring_load(&link->tx, RING_MASK) != value &&
	       !(value && ring_load(&link->tx, RING_READ) == ring_load(&link->tx, RING_WRITE))) {
		if (now_ns() > end)
			return false;
		usleep(100);
	}
	return true;
}

static void check_guards(const struct link *link, uint64_t number)
{
	for (uint32_t at = 0; at < RING_PAGE; at++)
		if (link->buffer[at] != GUARD || link->buffer[3 * RING_PAGE + at] != GUARD)
			fail("request %llu stored where it was not allowed to", (unsigned long long)number);
}

int main(int argc, char **argv)
{
	struct link link = { .fd = -1, .timeout = 60 };
	uint64_t id = 100;

	if (argc != 4)
		return 2;
	state = strtoull(argv[3], NULL, 10) * 0x9E3779B97F4A7C15u + 1;
	for (unsigned long epoch = 0; epoch < strtoul(argv[1], NULL, 10); epoch++) {
		current_test = "open";
		link_open_device(&link, SCSI_GUID, 0);
		memset(link.buffer, GUARD, BUFFER_PAGES * RING_PAGE);
		current_test = "handshake";
		handshake(&link);
		current_test = "requests";
		for (unsigned long number = 0; number < strtoul(argv[2], NULL, 10); number++) {
			uint8_t packet[PACKET], answer[PACKET];
			static uint64_t extension[1 + 4 * 41];
			size_t length = make_request(&link, packet, extension);

			send_packet(&link, length ? PACKET_GPA_DIRECT : PACKET_IN_BAND, PACKET_WANTS_COMPLETION, ++id,
				    extension, length, packet, PACKET);
			wait_for(&link, id, answer);
			check_guards(&link, id);
			good += answer[14] == 0x01;
			checked += answer[14] == 0x84;
			invalid += answer[14] == 0x06;
			other += answer[14] != 0x01 && answer[14] != 0x84 && answer[14] != 0x06;
		}
		current_test = "break";
		/* A host that is asleep has no mask; one that is about to handle what it got has one. Without this the
		   channel may be closed before the host has looked at the packet. */
		if (!wait_for_mask(&link, 0, link.timeout))
			fail("the host does not sleep within %d s", link.timeout);
		break_channel(&link, ++id);
		/* One that was about to sleep may meet an index that cannot be after it has cleared its mask. */
		wait_for_mask(&link, 1, 1);
		link_close(&link);
	}
	printf("{\"good\": %llu, \"checked\": %llu, \"invalid\": %llu, \"other\": %llu, \"ok\": true}\n",
	       (unsigned long long)good, (unsigned long long)checked, (unsigned long long)invalid,
	       (unsigned long long)other);
	return 0;
}
