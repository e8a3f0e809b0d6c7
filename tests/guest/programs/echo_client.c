/*
 * Drives the echo device from the guest's user space and checks every byte (protocol: emulator/vmbus/wire/echo.py).
 *
 *     gcc -static -O2 -Wall -Wextra -Werror -o echo_client echo_client.c
 *
 * Needs root and the module uio_hv_generic. Prints one line of JSON; exit status 0: all was right.
 *
 *     --count N             echo N packets (default 1000 if no other test is named)
 *     --size S              bytes of data in each, at most 16384; 0 (default): all kinds of sizes
 *     --burst B             at most B requests without an answer at a time (default 16)
 *     --answers KIND        completion, in-band, or both in turn (default)
 *     --fill N              let the host write N times into our pages, and sum what is there
 *     --fill-code N         the same with instructions that have been run before: no stale code may be left
 *     --generate N          let the host send N packets (--size, --burst), and fall behind on purpose
 *     --signal-latency N    N single round trips, each with a signal and an interrupt; times in microseconds
 *     --cycles N            close and open the channel N times, running everything each time
 *     --device N            the Nth echo device (default 0)
 *     --timeout S           the longest that any wait may take (default 30)
 */
#include <getopt.h>

#include "uio_link.h"

#define ECHO_GUID "1db72679-86d6-4f61-b61a-d7c1e85d20ff"
#define MAX_DATA 16384u
#define MAX_COUNT (1u << 24)

enum operation { ECHO = 1, FILL, CHECKSUM, GENERATE, GENERATED, STATISTICS };

struct echo_header {
	uint16_t operation;
	uint16_t status;
	uint32_t length;
	uint64_t sequence;
	uint32_t checksum;
	uint32_t reserved;
};

struct echo_range {
	uint64_t address;
	uint32_t length;
	uint32_t gpadl;
};

/* One request on its way out. `extension`: the ranges of a GPA-direct packet. */
struct request {
	enum operation operation;
	uint64_t sequence;
	const void *data;
	size_t length;
	const void *extension;
	size_t extension_length;
	bool completion;
};

struct answer {
	struct packet packet;
	struct echo_header header;
	const uint8_t *data;
};

static uint8_t pattern_bytes[MAX_DATA + 256];
static uint32_t crc_table[256];

static void make_tables(void)
{
	for (uint32_t n = 0; n < 256; n++) {
		uint32_t value = n;

		for (int bit = 0; bit < 8; bit++)
			value = value & 1 ? 0xEDB88320u ^ value >> 1 : value >> 1;
		crc_table[n] = value;
	}
	for (uint32_t n = 0; n < sizeof pattern_bytes; n++)
		pattern_bytes[n] = (uint8_t)(167 * n + 13);
}

static uint32_t crc32(const void *data, size_t length)
{
	const uint8_t *bytes = data;
	uint32_t crc = ~0u;

	while (length--)
		crc = crc_table[(crc ^ *bytes++) & 0xFF] ^ crc >> 8;
	return ~crc;
}

/* Data whose bytes tell which packet they belong to. */
static const uint8_t *pattern(uint64_t sequence)
{
	return pattern_bytes + sequence % 251;
}

static uint32_t random_below(uint32_t limit)
{
	static uint64_t state = 0x9E3779B97F4A7C15u;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 32) % limit;
}

/* --- one packet --------------------------------------------------------------------------------------------- */

static uint64_t transaction_of(uint64_t sequence)
{
	return sequence ^ 0xEC40000000000000u; /* all 64 bits have to come back */
}

/* False: no room now. */
static bool put_request(struct link *link, const struct request *request)
{
	struct echo_header header = {
		.operation = (uint16_t)request->operation,
		.length = (uint32_t)request->length,
		.sequence = request->sequence,
		.checksum = crc32(request->data, request->length),
	};
	int done = ring_put(&link->tx, request->extension ? PACKET_GPA_DIRECT : PACKET_IN_BAND,
			    request->completion ? PACKET_WANTS_COMPLETION : 0, transaction_of(request->sequence),
			    request->extension, request->extension_length, &header, sizeof header, request->data,
			    request->length);

	if (done < 0)
		fail("a request of %zu bytes cannot be put on the ring", request->length);
	return done;
}

static void publish(struct link *link)
{
	if (ring_publish(&link->tx))
		link_signal(link);
}

static void release(struct link *link)
{
	if (ring_release(&link->rx))
		link_signal(link);
}

/* Takes one packet, if there is one, and checks all that does not depend on what was asked. */
static bool get_answer(struct link *link, struct answer *answer)
{
	static uint8_t payload[MAX_DATA + 64];
	size_t length;
	int got = ring_get(&link->rx, &answer->packet, payload, sizeof payload, &length);

	if (got < 0)
		fail("the ring from the host is damaged at %u", link->rx.index);
	if (got == 0)
		return false;
	if (length < sizeof answer->header)
		fail("a packet of %zu bytes has no header", length);
	memcpy(&answer->header, payload, sizeof answer->header);
	answer->data = payload + sizeof answer->header;
	if (answer->header.length > length - sizeof answer->header ||
	    ring_padded(answer->header.length) != length - sizeof answer->header)
		fail("%u bytes of data in a payload of %zu", answer->header.length, length);
	if (answer->header.checksum != crc32(answer->data, answer->header.length))
		fail("packet %llu has a wrong checksum", (unsigned long long)answer->header.sequence);
	if (answer->header.status)
		fail("operation %u was answered with status %u", answer->header.operation, answer->header.status);
	return true;
}

static void check_answer(const struct answer *answer, const struct request *request)
{
	if (answer->header.operation != request->operation || answer->header.sequence != request->sequence ||
	    answer->packet.transaction_id != transaction_of(request->sequence))
		fail("answer %u/%llu/%#llx to request %u/%llu", answer->header.operation,
		     (unsigned long long)answer->header.sequence,
		     (unsigned long long)answer->packet.transaction_id, request->operation,
		     (unsigned long long)request->sequence);
	if (answer->packet.type != (request->completion ? PACKET_COMPLETION : PACKET_IN_BAND))
		fail("answer %llu is a packet of type %u", (unsigned long long)request->sequence,
		     answer->packet.type);
}

/* One request and its answer. */
static struct answer ask(struct link *link, const struct request *request)
{
	struct answer answer;

	while (!put_request(link, request))
		if (!ring_wait_for_room(&link->tx))
			link_wait(link);
	ring_room_came(&link->tx);
	publish(link);
	while (!get_answer(link, &answer))
		link_wait(link);
	release(link);
	check_answer(&answer, request);
	return answer;
}

/* --- the tests ---------------------------------------------------------------------------------------------- */

struct options {
	unsigned count, size, burst, fill, fill_code, generate, latency, cycles, device;
	const char *answers, *loopback;
};

static uint32_t largest_data(const struct link *link)
{
	uint32_t least = link->tx.size < link->rx.size ? link->tx.size : link->rx.size;
	uint32_t fits = least - 64 - (uint32_t)sizeof(struct echo_header);

	return fits < MAX_DATA ? fits & ~7u : MAX_DATA;
}

static struct request echo_request(const struct link *link, const struct options *options, uint64_t sequence)
{
	static const uint32_t steps[] = { 0, 1, 7, 8, 9, 100, 1500, 4000, 9000, MAX_DATA };
	uint32_t size = options->size ? options->size : steps[sequence % 10] + (uint32_t)(sequence / 10 % 8);

	if (size > largest_data(link))
		size = largest_data(link);
	return (struct request){
		.operation = ECHO,
		.sequence = sequence,
		.data = pattern(sequence),
		.length = size,
		.completion = *options->answers == 'c' || (*options->answers == 'b' && sequence % 2),
	};
}

static void test_echo(struct link *link, const struct options *options)
{
	uint64_t bytes = 0, full = 0, start = now_ns();
	unsigned sent = 0, received = 0;
	struct answer answer;

	current_test = "echo";
	while (received < options->count) {
		bool room = true, got = false;

		while (sent < options->count && sent - received < options->burst) {
			struct request request = echo_request(link, options, sent);

			room = put_request(link, &request);
			if (!room)
				break;
			sent++;
		}
		if (room)
			ring_room_came(&link->tx);
		publish(link);
		while (get_answer(link, &answer)) {
			/* The device answers in order. */
			struct request request = echo_request(link, options, received);

			check_answer(&answer, &request);
			if (answer.header.length != request.length ||
			    memcmp(answer.data, request.data, request.length) != 0)
				fail("packet %u came back changed", received);
			bytes += request.length;
			received++;
			got = true;
		}
		release(link);
		if (got)
			continue;
		if (!room) {
			full++;
			if (ring_wait_for_room(&link->tx))
				continue;
		}
		link_wait(link);
	}
	printf(", \"echo\": {\"packets\": %u, \"bytes\": %llu, \"seconds\": %.6f, \"ring_full\": %llu}", received,
	       (unsigned long long)bytes, (double)(now_ns() - start) / 1e9, (unsigned long long)full);
}

/* The packet extension for `length` bytes at `offset` of the buffer, as one range. Returns its length. */
static size_t gpa_direct(const struct link *link, uint64_t *extension, uint32_t offset, uint32_t length)
{
	uint32_t first = offset / RING_PAGE, last = (offset + length - 1) / RING_PAGE;
	uint32_t words[4] = { 0, 1, length, offset % RING_PAGE };

	memcpy(extension, words, sizeof words);
	for (uint32_t page = first; page <= last; page++)
		extension[2 + page - first] = buffer_pfn(link, page);
	return 16 + 8u * (last - first + 1);
}

/* The same as a list at the start of an in-band packet's data: count, then one range for each page. */
static size_t range_list(const struct link *link, uint8_t *data, uint32_t offset, uint32_t length)
{
	uint32_t words[2] = { 0, 0 };
	size_t at = sizeof words;

	while (length) {
		uint32_t inside = offset % RING_PAGE;
		uint32_t step = length < RING_PAGE - inside ? length : RING_PAGE - inside;
		struct echo_range range = { buffer_pfn(link, offset / RING_PAGE) * RING_PAGE + inside, step, 0 };

		memcpy(data + at, &range, sizeof range);
		at += sizeof range;
		words[0]++;
		offset += step;
		length -= step;
	}
	memcpy(data, words, sizeof words);
	return at;
}

/* Lets the host write `bytes`, repeated, over `length` bytes of the buffer. */
static void host_fill(struct link *link, uint64_t sequence, uint32_t offset, uint32_t length, const uint8_t *bytes,
		      size_t count, bool in_band)
{
	static uint8_t data[MAX_DATA];
	uint64_t extension[2 + BUFFER_PAGES];
	struct request request = { .operation = FILL, .sequence = sequence, .completion = true, .data = data };

	if (in_band) {
		request.length = range_list(link, data, offset, length);
	} else {
		request.extension_length = gpa_direct(link, extension, offset, length);
		request.extension = extension;
	}
	memcpy(data + request.length, bytes, count);
	request.length += count;
	ask(link, &request);
}

static uint32_t host_checksum(struct link *link, uint64_t sequence, uint32_t offset, uint32_t length, bool in_band)
{
	static uint8_t data[256];
	uint64_t extension[2 + BUFFER_PAGES];
	struct request request = { .operation = CHECKSUM, .sequence = sequence, .data = data };
	struct answer answer;
	uint32_t found[2];

	if (in_band) {
		request.length = range_list(link, data, offset, length);
	} else {
		request.extension_length = gpa_direct(link, extension, offset, length);
		request.extension = extension;
	}
	answer = ask(link, &request);
	if (answer.header.length < sizeof found)
		fail("a checksum answer of %u bytes", answer.header.length);
	memcpy(found, answer.data, sizeof found);
	if (found[1] != length)
		fail("%u of %u bytes were summed", found[1], length);
	return found[0];
}

static void test_fill(struct link *link, const struct options *options)
{
	static uint8_t expected[BUFFER_PAGES * RING_PAGE];
	uint64_t bytes = 0, start = now_ns();

	current_test = "fill";
	memcpy(expected, link->buffer, sizeof expected);
	for (unsigned n = 0; n < options->fill; n++) {
		uint32_t offset = random_below(sizeof expected);
		uint32_t length = 1 + random_below((uint32_t)sizeof expected - offset);
		size_t count = 1 + random_below(2048);
		const uint8_t *source = pattern(n);

		if (count > length)
			count = length;
		for (uint32_t at = 0; at < length; at++)
			expected[offset + at] = source[at % count];
		host_fill(link, 2 * n, offset, length, source, count, n % 2);
		if (memcmp(expected, link->buffer, sizeof expected) != 0)
			fail("fill %u of %u bytes at %u: the pages do not hold what they should", n, length, offset);
		if (host_checksum(link, 2 * n + 1, offset, length, n % 2) != crc32(expected + offset, length))
			fail("the host sums other bytes than it wrote (%u)", n);
		bytes += length;
	}
	printf(", \"fill\": {\"transfers\": %u, \"bytes\": %llu, \"seconds\": %.6f}", options->fill,
	       (unsigned long long)bytes, (double)(now_ns() - start) / 1e9);
}

#define CODE_SIZE 6

/* mov eax, value; ret */
static void make_code(uint8_t *code, uint32_t value)
{
	code[0] = 0xB8;
	memcpy(code + 1, &value, 4);
	code[5] = 0xC3;
}

static uint32_t run_code(const uint8_t *code)
{
	uint32_t (*function)(void);

	memcpy(&function, &code, sizeof function);
	return function();
}

/*
 * Code that ran is replaced by the host and run again, at places inside a page and over a page border, once in
 * one piece and once only the piece behind the border (whose page the translation may not be filed under).
 */
static void test_fill_code(struct link *link, const struct options *options)
{
	static const int borders[] = { 0, 1, 2, 3, 4, 5 }; /* bytes before the border; 0: not at the border */
	unsigned stale = 0;

	current_test = "fill-code";
	for (unsigned n = 0; n < options->fill_code; n++) {
		unsigned before = (unsigned)borders[n % 6];
		uint32_t offset = before ? RING_PAGE - before : 64 + 8 * random_below(256);
		bool tail = before && n / 6 % 2;
		uint32_t kept = tail && before > 1 ? 0xFFFFFFFFu >> (32 - 8 * (before - 1)) : 0;
		uint8_t *code = link->buffer + offset, bytes[CODE_SIZE];
		uint32_t value = 2 * n + 0x01010101u * (n & 0xFF);

		make_code(bytes, value);
		memcpy(code, bytes, sizeof bytes);
		if (run_code(code) != value)
			fail("code that the guest wrote itself returned another value");
		for (unsigned again = 0; again < 2; again++) {
			uint32_t skip = tail ? before : 0, next = value + 0x9E3779B9u * (again + 1);

			next = (next & ~kept) | (value & kept);
			make_code(bytes, next);
			host_fill(link, 2 * n + again, offset + skip, CODE_SIZE - skip, bytes + skip,
				  CODE_SIZE - skip, n / 12 % 2);
			if (memcmp(code, bytes, sizeof bytes) != 0)
				fail("fill %u: the code is not in the page", n);
			stale += run_code(code) != next;
		}
	}
	if (stale)
		fail("%u of %u runs executed code that the host had replaced", stale, 2 * options->fill_code);
	printf(", \"fill_code\": {\"runs\": %u, \"stale\": 0}", 2 * options->fill_code);
}

static void test_generate(struct link *link, const struct options *options)
{
	uint32_t size = options->size ? options->size : 512;
	uint32_t data[4] = { options->generate, size, options->burst == 1 ? 1 : 0, 0 };
	struct request request = { .operation = GENERATE, .data = data, .length = sizeof data, .completion = true };
	uint64_t interrupts = link->interrupts, waited = 0, start = now_ns();
	struct answer answer;

	current_test = "generate";
	if (size > largest_data(link))
		data[1] = size = largest_data(link);
	ask(link, &request);
	for (unsigned n = 0; n < options->generate; n++) {
		/* Let the host fill the ring now and then, and let it get its room back packet by packet. */
		uint64_t left = (uint64_t)(options->generate - n) * (size + 64);

		for (int wait = 0; n % 4096 == 0 && left > link->rx.size && wait < 1000; wait++) {
			if (ring_load(&link->rx, RING_PENDING))
				break;
			usleep(1000);
		}
		waited += ring_load(&link->rx, RING_PENDING) != 0;
		while (!get_answer(link, &answer))
			link_wait(link);
		if (answer.header.operation != GENERATED || answer.header.sequence != n ||
		    answer.packet.type != PACKET_IN_BAND || answer.packet.transaction_id != 0)
			fail("operation %u sequence %llu instead of generated packet %u", answer.header.operation,
			     (unsigned long long)answer.header.sequence, n);
		if (answer.header.length != size || memcmp(answer.data, pattern(n), size) != 0)
			fail("generated packet %u has other bytes", n);
		release(link);
	}
	printf(", \"generate\": {\"packets\": %u, \"size\": %u, \"seconds\": %.6f, \"interrupts\": %llu, "
	       "\"host_waited\": %llu}",
	       options->generate, size, (double)(now_ns() - start) / 1e9,
	       (unsigned long long)(link->interrupts - interrupts), (unsigned long long)waited);
}

static int compare_times(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return a < b ? -1 : a > b;
}

static void test_latency(struct link *link, const struct options *options)
{
	uint64_t *times = calloc(options->latency, sizeof *times), signals = link->signals, start;
	unsigned last = options->latency - 1;

	current_test = "signal-latency";
	if (!times)
		fail("no memory for %u times", options->latency);
	for (unsigned n = 0; n < options->latency; n++) {
		struct request request = { .operation = ECHO, .sequence = n, .data = pattern(n), .length = 8 };

		usleep(1000); /* let the host go to sleep, or it finds the request without a signal */
		start = now_ns();
		ask(link, &request);
		times[n] = now_ns() - start;
	}
	qsort(times, options->latency, sizeof *times, compare_times);
	printf(", \"signal_latency_us\": {\"count\": %u, \"min\": %.1f, \"median\": %.1f, \"p99\": %.1f, "
	       "\"max\": %.1f, \"signals\": %llu}",
	       options->latency, (double)times[0] / 1e3, (double)times[last / 2] / 1e3,
	       (double)times[(uint64_t)last * 99 / 100] / 1e3, (double)times[last] / 1e3,
	       (unsigned long long)(link->signals - signals));
	free(times);
}

static void print_statistics(struct link *link)
{
	static const char *const names[] = { "requests",     "refused",      "echoed_bytes",
					     "filled_bytes", "summed_bytes", "generated" };
	struct request request = { .operation = STATISTICS, .completion = true };
	struct answer answer;
	uint64_t counters[6];

	current_test = "statistics";
	answer = ask(link, &request);
	if (answer.header.length != sizeof counters)
		fail("%u bytes of statistics", answer.header.length);
	memcpy(counters, answer.data, sizeof counters);
	printf(", \"host\": {");
	for (int n = 0; n < 6; n++)
		printf("%s\"%s\": %llu", n ? ", " : "", names[n], (unsigned long long)counters[n]);
	printf("}, \"interrupts\": %llu, \"signals\": %llu", (unsigned long long)link->interrupts,
	       (unsigned long long)link->signals);
}

/* --- the command line --------------------------------------------------------------------------------------- */

static unsigned number(const char *name, const char *text, unsigned least, unsigned most)
{
	char *end;
	unsigned long value = strtoul(text, &end, 0);

	if (*end || end == text || value < least || value > most) {
		fprintf(stderr, "echo_client: --%s wants a number from %u to %u, not %s\n", name, least, most, text);
		exit(2);
	}
	return (unsigned)value;
}

static void parse(int argc, char **argv, struct options *options, struct link *link)
{
	static const struct option names[] = {
		{ "count", required_argument, NULL, 'n' },	    { "size", required_argument, NULL, 's' },
		{ "burst", required_argument, NULL, 'b' },	    { "answers", required_argument, NULL, 'a' },
		{ "fill", required_argument, NULL, 'f' },	    { "fill-code", required_argument, NULL, 'c' },
		{ "generate", required_argument, NULL, 'g' },	    { "signal-latency", required_argument, NULL, 'l' },
		{ "cycles", required_argument, NULL, 'y' },	    { "device", required_argument, NULL, 'd' },
		{ "timeout", required_argument, NULL, 't' },	    { "loopback", required_argument, NULL, 'o' },
		{ NULL, 0, NULL, 0 },
	};
	int option, index = 0;

	while ((option = getopt_long(argc, argv, "", names, &index)) != -1) {
		switch (option) {
		case 'n': options->count = number("count", optarg, 1, MAX_COUNT); break;
		case 's': options->size = number("size", optarg, 0, MAX_DATA); break;
		case 'b': options->burst = number("burst", optarg, 1, MAX_COUNT); break;
		case 'f': options->fill = number("fill", optarg, 1, MAX_COUNT); break;
		case 'c': options->fill_code = number("fill-code", optarg, 1, MAX_COUNT); break;
		case 'g': options->generate = number("generate", optarg, 1, MAX_COUNT); break;
		case 'l': options->latency = number("signal-latency", optarg, 1, MAX_COUNT); break;
		case 'y': options->cycles = number("cycles", optarg, 1, MAX_COUNT); break;
		case 'd': options->device = number("device", optarg, 0, 2047); break;
		case 't': link->timeout = (int)number("timeout", optarg, 1, 86400); break;
		case 'o': options->loopback = optarg; break;
		case 'a':
			options->answers = optarg;
			if (!strcmp(optarg, "both") || !strcmp(optarg, "completion") || !strcmp(optarg, "in-band"))
				break;
			fprintf(stderr, "echo_client: --answers is completion, in-band or both\n");
			exit(2);
		default:
			exit(2);
		}
	}
	if (optind != argc) {
		fprintf(stderr, "echo_client: what is %s?\n", argv[optind]);
		exit(2);
	}
	if (!options->count && !options->fill && !options->fill_code && !options->generate && !options->latency)
		options->count = 1000;
}

int main(int argc, char **argv)
{
	struct options options = { .burst = 16, .answers = "both", .cycles = 1 };
	struct link link = { .fd = -1, .timeout = 30 };

	parse(argc, argv, &options, &link);
	make_tables();
	for (unsigned cycle = 0; cycle < options.cycles; cycle++) {
		current_test = "open";
		if (options.loopback)
			link_open_loopback(&link, options.loopback);
		else
			link_open_device(&link, ECHO_GUID, (int)options.device);
		printf("{\"cycle\": %u", cycle);
		line_begun = true;
		if (options.count)
			test_echo(&link, &options);
		if (options.fill)
			test_fill(&link, &options);
		if (options.fill_code)
			test_fill_code(&link, &options);
		if (options.generate)
			test_generate(&link, &options);
		if (options.latency)
			test_latency(&link, &options);
		print_statistics(&link);
		printf(", \"ok\": true}\n");
		line_begun = false;
		fflush(stdout);
		link_close(&link);
	}
	return 0;
}
