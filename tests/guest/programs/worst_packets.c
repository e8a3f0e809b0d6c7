/*
 * Sends what occupies most memory of its host, for as long as the host takes it, through uio_hv_generic.
 *
 *     worst_packets PACKETS
 *
 * To an echo device the largest packets that there are; to a storage controller comparisons of a megabyte, for each of
 * which the host needs two buffers. Each device gets PACKETS packets from a guest that takes its answers, then up to four
 * times as many from one that takes none; each time the channel is closed with all that is under way. Prints one line
 * of JSON; "stuck" counts the times that the host took no more.
 */
#include "storvsc.h"

#define ECHO_GUID "1db72679-86d6-4f61-b61a-d7c1e85d20ff"
#define ECHO_HEADER 24u
#define LARGEST (UINT16_MAX * 8u - PACKET_HEADER)
#define COMPARED (1u << 20)
#define BLOCK 512u
#define STUCK_NS 2000000000u

static uint8_t echo[LARGEST];
static size_t echo_length;
static uint8_t compare[PACKET];
static uint64_t ranges[2 + COMPARED / RING_PAGE];
static uint64_t packets, bytes, stuck;

static uint32_t crc32(const uint8_t *data, size_t length)
{
	uint32_t crc = ~0u;

	for (size_t at = 0; at < length; at++) {
		crc ^= data[at];
		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
	}
	return ~crc;
}

/* ECHO, with as much data as a packet has, or with as much as fits into half of the ring. */
static void prepare_echo(const struct link *link)
{
	uint32_t half = link->tx.size / 2 / 8 * 8;

	echo_length = half < LARGEST ? half : LARGEST;
	memset(echo + ECHO_HEADER, 0xEE, echo_length - ECHO_HEADER);
	echo[0] = 1;
	put32(echo + 4, (uint32_t)(echo_length - ECHO_HEADER));
	put32(echo + 16, crc32(echo + ECHO_HEADER, echo_length - ECHO_HEADER));
}

/* VERIFY(10) with BYTCHK: the host reads the medium and the guest's memory, and compares them. */
static void prepare_comparison(const struct link *link)
{
	uint8_t *cdb = compare + 28;
	uint32_t blocks = COMPARED / BLOCK;

	put32(compare, 3);
	put32(compare + 4, 1);
	compare[12] = 0x34;
	compare[20] = 10;
	compare[21] = 20;
	put32(compare + 24, COMPARED);
	cdb[0] = 0x2F;
	cdb[1] = 2;
	cdb[7] = (uint8_t)(blocks >> 8);
	cdb[8] = (uint8_t)blocks;
	ranges[0] = 1ull << 32;
	ranges[1] = COMPARED;
	for (size_t page = 0; page < COMPARED / RING_PAGE; page++)
		ranges[2 + page] = buffer_pfn(link, page % BUFFER_PAGES);
}

/* Takes all answers, without a look at them. */
static bool take_answers(struct link *link)
{
	uint32_t write = ring_load(&link->rx, RING_WRITE);

	if (!ring_index_ok(&link->rx, write))
		fail("the host's ring is corrupt");
	if (write == link->rx.index)
		return false;
	link->rx.index = write;
	if (ring_release(&link->rx))
		link_signal(link);
	return true;
}

/* Sends packets, up to `most`, until the host takes none for a while. */
static uint64_t flood(struct link *link, bool storage, bool deaf, uint64_t most)
{
	uint64_t sent = 0, last = now_ns(), patience = deaf ? STUCK_NS : (uint64_t)link->timeout * 1000000000u;

	while (sent < most) {
		int done = storage ? ring_put(&link->tx, PACKET_GPA_DIRECT, PACKET_WANTS_COMPLETION, 1000 + sent, ranges,
					      sizeof ranges, compare, sizeof compare, NULL, 0)
				   : ring_put(&link->tx, PACKET_IN_BAND, 0, 1000 + sent, NULL, 0, echo, echo_length, NULL, 0);

		if (done < 0)
			fail("packet %llu cannot be sent in a ring of %u bytes", (unsigned long long)sent, link->tx.size);
		if (ring_publish(&link->tx))
			link_signal(link);
		if (done) {
			sent++;
			bytes += storage ? COMPARED : echo_length;
			last = now_ns();
			continue;
		}
		if (!deaf && take_answers(link))
			last = now_ns();
		if (now_ns() - last > patience) {
			if (!deaf)
				fail("the host took nothing for %d s", link->timeout);
			break;
		}
		if (ring_wait_for_room(&link->tx))
			continue;
		usleep(1000);
	}
	packets += sent;
	return sent;
}

int main(int argc, char **argv)
{
	struct link link = { .fd = -1, .timeout = 60 };

	if (argc != 2)
		return 2;
	for (int round = 0; round < 8; round++) {
		bool storage = round & 1, deaf = round & 2;

		current_test = storage ? "comparisons" : "largest packets";
		link_open_device(&link, storage ? SCSI_GUID : ECHO_GUID, 0);
		if (storage) {
			handshake(&link);
			prepare_comparison(&link);
		} else {
			prepare_echo(&link);
		}
		uint64_t most = (deaf ? 4 : 1) * strtoull(argv[1], NULL, 10);

		stuck += flood(&link, storage, deaf, most) < most;
		link_close(&link);
	}
	printf("{\"packets\": %llu, \"bytes\": %llu, \"stuck\": %llu, \"ok\": true}\n", (unsigned long long)packets,
	       (unsigned long long)bytes, (unsigned long long)stuck);
	return 0;
}
