/*
 * Writes records to a file system and says which of them the disk has acknowledged, until the machine is killed.
 *
 *     durable_writer FOLDER FIRST
 *
 * Record N (4096 bytes, every word of it follows from N) goes to slot N % SLOTS of FOLDER/slots, then fdatasync();
 * every 8th is a new file FOLDER/file-N too, with fsync() of it and of the folder. Only then "N" is printed, a line
 * each. FIRST is the first number.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SLOTS 256
#define SIZE 4096

__attribute__((noreturn)) static void fail(const char *what)
{
	printf("failed: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void fill(uint64_t *record, uint64_t number)
{
	for (size_t at = 0; at < SIZE / sizeof *record; at++)
		record[at] = number * 0x9E3779B97F4A7C15u + at;
	record[0] = number;
}

int main(int argc, char **argv)
{
	static uint64_t record[SIZE / 8] __attribute__((aligned(4096)));
	char name[64];
	int folder, slots;

	if (argc != 3)
		return 2;
	folder = open(argv[1], O_RDONLY | O_DIRECTORY);
	slots = folder < 0 ? -1 : openat(folder, "slots", O_RDWR | O_CREAT, 0644);
	if (slots < 0)
		fail(argv[1]);
	for (uint64_t number = strtoull(argv[2], NULL, 10);; number++) {
		fill(record, number);
		if (pwrite(slots, record, SIZE, (off_t)(number % SLOTS * SIZE)) != SIZE)
			fail("slot");
		if (fdatasync(slots) != 0)
			fail("fdatasync");
		if (number % 8 == 0) {
			int file;

			snprintf(name, sizeof name, "file-%llu", (unsigned long long)number);
			file = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL, 0644);
			if (file < 0 || write(file, record, SIZE) != SIZE)
				fail(name);
			if (fsync(file) != 0 || close(file) != 0 || fsync(folder) != 0)
				fail("fsync");
		}
		printf("%llu\n", (unsigned long long)number);
		fflush(stdout);
	}
}
