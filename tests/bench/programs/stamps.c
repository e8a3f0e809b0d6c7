/*
 * Sends packets that carry the guest's TSC, one at a time (tests/bench/doorbell.py).
 *
 *     stamps GUID COUNT PAUSE_US
 *
 * A packet is: TSC before the signal, and TSC when the answer to the packet before was seen.
 */
#include <x86intrin.h>

#include "uio_link.h"

int main(int argc, char **argv)
{
	struct link link = { .fd = -1, .timeout = 30 };
	uint64_t stamps[2] = { 0, 0 };
	unsigned count, pause_us;

	if (argc != 4)
		return 2;
	count = (unsigned)strtoul(argv[2], NULL, 0);
	pause_us = (unsigned)strtoul(argv[3], NULL, 0);
	link_open_device(&link, argv[1], 0);
	for (unsigned n = 0; n < count; n++) {
		struct packet packet;
		uint64_t answer[64];
		size_t length;

		if (pause_us)
			usleep(pause_us);
		stamps[0] = __rdtsc();
		if (ring_put(&link.tx, PACKET_IN_BAND, PACKET_WANTS_COMPLETION, n, NULL, 0, stamps, sizeof stamps, NULL,
			     0) != 1)
			fail("no room");
		if (ring_publish(&link.tx))
			link_signal(&link);
		while (ring_get(&link.rx, &packet, answer, sizeof answer, &length) != 1)
			link_wait(&link);
		stamps[1] = __rdtsc();
		if (ring_release(&link.rx))
			link_signal(&link);
	}
	return 0;
}
