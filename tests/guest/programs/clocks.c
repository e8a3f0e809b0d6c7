/*
 * Watches the guest's clocks for steps back and for disagreement, until it is killed.
 *
 *     gcc -static -O2 -Wall -Wextra -Werror -o clocks clocks.c
 *
 * Needs root and the module msr. Four clocks: CLOCK_MONOTONIC and CLOCK_MONOTONIC_RAW (computed from the
 * reference TSC page), the TSC itself, and the reference counter MSR (0x40000020, units of 100 ns). Prints a line of JSON every 100 ms:
 *
 *     rounds             readings of all of them so far
 *     back               steps back so far, of any of them
 *     gap_us             the longest time between two readings since the last line
 *     apart_min/max_ns   reference counter less CLOCK_MONOTONIC_RAW, against the first reading: 0 if they agree
 *     monotonic_ns       CLOCK_MONOTONIC, and the reference counter, when the line was made
 *     reference_ns
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define REFERENCE_COUNTER 0x40000020

static int64_t monotonic_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int64_t reference_ns(int msr)
{
	int64_t value;

	if (pread(msr, &value, sizeof value, REFERENCE_COUNTER) != sizeof value) {
		perror("reference counter");
		exit(1);
	}
	return value * 100;
}

int main(void)
{
	int msr = open("/dev/cpu/0/msr", O_RDONLY);
	int64_t last_ns = 0, last_reference = 0, last_monotonic = 0, first = INT64_MIN, shown = 0, gap = 0, low = 0, high = 0;
	uint64_t last_tsc = 0, rounds = 0, back = 0;

	if (msr < 0) {
		perror("/dev/cpu/0/msr");
		return 1;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (;;) {
		int64_t monotonic = monotonic_ns(CLOCK_MONOTONIC);
		int64_t before = monotonic_ns(CLOCK_MONOTONIC_RAW);
		int64_t reference = reference_ns(msr);
		int64_t after = monotonic_ns(CLOCK_MONOTONIC_RAW);
		uint64_t tsc = __rdtsc();
		/* The counter was read in between: how far it is outside of that. */
		int64_t apart = reference - (before + after) / 2;

		if (first == INT64_MIN)
			first = apart;
		apart -= first;
		back += monotonic < last_monotonic;
		back += before < last_ns;
		back += after < before;
		back += reference < last_reference;
		back += tsc < last_tsc;
		if (rounds && before - last_ns > gap)
			gap = before - last_ns;
		if (after - before < 1000000) {
			low = apart < low ? apart : low;
			high = apart > high ? apart : high;
		}
		last_monotonic = monotonic;
		last_ns = after;
		last_reference = reference;
		last_tsc = tsc;
		rounds++;
		if (after - shown > 100000000) {
			printf("{\"rounds\": %" PRIu64 ", \"back\": %" PRIu64 ", \"gap_us\": %" PRId64
			       ", \"apart_min_ns\": %" PRId64 ", \"apart_max_ns\": %" PRId64
			       ", \"monotonic_ns\": %" PRId64 ", \"reference_ns\": %" PRId64 "}\n",
			       rounds, back, gap / 1000, low, high, monotonic, reference);
			shown = after;
			gap = 0;
		}
	}
}
