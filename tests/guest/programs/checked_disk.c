/*
 * Writes a disk at random and reads all of it, again and again: every word is compared with what was written last.
 *
 *   checked_disk --device /dev/sda [--depth 8]
 *
 * What a block must hold follows from its number and from how often it was written, which this program remembers: a
 * block that is lost, old, torn or in the wrong place is found. Linux's native asynchronous I/O through raw system
 * calls, without the page cache. Prints one line of JSON after each pass, and never ends; what is wrong ends it, with a
 * line that begins with "failed".
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, MAX_BLOCKS = 16, MAX_DEPTH = 64, MAX_SIZE = 1 << 16, WRITES = 4 };

/* One request at a time, of `count` blocks. */
struct slot {
	struct iocb request;
	uint64_t *data;
	uint32_t first, count;
};

static uint32_t written[MAX_SIZE]; /* how often */
static uint8_t busy[MAX_SIZE];
static uint64_t random_state = 88172645463325252u;

static uint64_t next_random(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static void die(const char *what)
{
	printf("failed: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t word(uint32_t block, uint32_t generation, uint32_t index)
{
	uint64_t x = ((uint64_t)block << 32 | generation) + index * 0x9e3779b97f4a7c15u;

	return x ^ x >> 29;
}

static void fill(const struct slot *slot)
{
	for (uint32_t b = 0; b < slot->count; b++)
		for (uint32_t i = 0; i < WORDS; i++)
			slot->data[b * WORDS + i] = word(slot->first + b, written[slot->first + b], i);
}

static void check(const struct slot *slot)
{
	for (uint32_t b = 0; b < slot->count; b++) {
		uint32_t block = slot->first + b;

		for (uint32_t i = 0; i < WORDS; i++) {
			uint64_t found = slot->data[b * WORDS + i], right = word(block, written[block], i);

			if (found != right) {
				printf("failed: block %u, written %u times, word %u: %016" PRIx64 ", not %016" PRIx64 "\n",
				       block, written[block], i, found, right);
				exit(1);
			}
		}
	}
}

static int is_free(uint32_t first, uint32_t count)
{
	for (uint32_t b = first; b < first + count; b++)
		if (busy[b])
			return 0;
	return 1;
}

int main(int argc, char **argv)
{
	const char *device = "/dev/sda";
	long depth = 8;

	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--device"))
			device = argv[i + 1];
		else if (!strcmp(argv[i], "--depth"))
			depth = strtol(argv[i + 1], NULL, 0);
		else
			return 2;
	}
	if (depth < 1 || depth > MAX_DEPTH)
		return 2;
	int disk = open(device, O_RDWR | O_DIRECT);
	uint64_t size = 0;
	if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) < 0)
		die(device);
	uint32_t blocks = size / BLOCK;
	if (blocks < MAX_BLOCKS || blocks > MAX_SIZE)
		return 2;
	aio_context_t context = 0;
	if (syscall(SYS_io_setup, depth, &context) < 0)
		die("io_setup");
	static struct slot slots[MAX_DEPTH];
	uint32_t idle[MAX_DEPTH], idles = depth;
	for (long i = 0; i < depth; i++) {
		void *buffer;

		if (posix_memalign(&buffer, BLOCK, MAX_BLOCKS * BLOCK))
			die("memory");
		slots[i].data = buffer;
		slots[i].request = (struct iocb){
			.aio_fildes = disk, .aio_buf = (uintptr_t)buffer, .aio_data = i};
		idle[i] = i;
	}

	uint32_t cursor = 0, checked = 0;
	uint64_t pass = 0, writes = 0;
	int filling = 1; /* the first pass writes all blocks, once */
	for (;;) {
		long flying = depth - idles;

		while (idles && cursor < blocks) { /* at its end a pass waits for its reads */
			struct slot *slot = &slots[idle[idles - 1]];
			struct iocb *pointer = &slot->request;
			int writing = filling || next_random() % WRITES == 0, random = writing && !filling;

			slot->count = 1 + next_random() % MAX_BLOCKS;
			if (random)
				slot->first = next_random() % (blocks - slot->count + 1);
			else
				slot->first = cursor;
			if (slot->count > blocks - slot->first)
				slot->count = blocks - slot->first;
			if (!is_free(slot->first, slot->count)) {
				if (flying)
					break;
				continue;
			}
			memset(busy + slot->first, 1, slot->count);
			if (writing) {
				for (uint32_t b = 0; b < slot->count; b++)
					written[slot->first + b]++;
				fill(slot);
				writes++;
			}
			if (!random)
				cursor += slot->count;
			pointer->aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
			pointer->aio_offset = (int64_t)slot->first * BLOCK;
			pointer->aio_nbytes = slot->count * BLOCK;
			if (syscall(SYS_io_submit, context, 1, &pointer) != 1)
				die("io_submit");
			idles--;
			flying++;
		}

		struct io_event events[MAX_DEPTH];
		long count = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		if (count < 0)
			die("io_getevents");
		for (long i = 0; i < count; i++) {
			struct slot *slot = &slots[events[i].data];
			int writing = slot->request.aio_lio_opcode == IOCB_CMD_PWRITE;

			if (events[i].res != (int64_t)slot->request.aio_nbytes) {
				printf("failed: %s of block %u: %" PRId64 "\n", writing ? "write" : "read",
				       slot->first, (int64_t)events[i].res);
				return 1;
			}
			if (!writing)
				check(slot);
			if (filling || !writing)
				checked += slot->count;
			memset(busy + slot->first, 0, slot->count);
			idle[idles++] = events[i].data;
		}
		if (checked == blocks) {
			if (!filling) {
				printf("{\"disk\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"writes\": %" PRIu64 "}\n",
				       ++pass, (uint64_t)blocks * BLOCK, writes);
				fflush(stdout);
			}
			filling = 0;
			cursor = checked = 0;
		}
	}
}
