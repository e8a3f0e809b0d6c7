/*
 * Load on a disk, without the page cache: random or sequential, a fixed number of requests in flight.
 *
 *   disk_load --device /dev/sda [--block 4096] [--depth 32] [--seconds 5] [--write] [--sequential]
 *
 * Linux's native asynchronous I/O through raw system calls, so that no library is needed. Prints one line of JSON.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MOST_DEPTH = 256 };

static double now(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec * 1e-9;
}

static void die(const char *what)
{
    fprintf(stderr, "disk_load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t random_state = 88172645463325252u;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

int main(int argc, char **argv)
{
    const char *device = "/dev/sda";
    size_t block = 4096;
    long depth = 32;
    double seconds = 5;
    int writing = 0, sequential = 0;

    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--write"))
            writing = 1;
        else if (!strcmp(argv[i], "--sequential"))
            sequential = 1;
        else if (i + 1 == argc)
            return 2;
        else if (!strcmp(argv[i], "--device"))
            device = argv[++i];
        else if (!strcmp(argv[i], "--block"))
            block = strtoul(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--depth"))
            depth = strtol(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--seconds"))
            seconds = strtod(argv[++i], NULL);
        else
            return 2;
    }
    if (depth < 1 || depth > MOST_DEPTH || block < 512)
        return 2;

    int disk = open(device, (writing ? O_RDWR : O_RDONLY) | O_DIRECT);
    uint64_t size = 0;
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) < 0)
        die(device);
    uint64_t blocks = size / block, at = 0;
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, depth, &context) < 0)
        die("io_setup");

    struct iocb requests[MOST_DEPTH], *pointers[MOST_DEPTH];
    struct io_event events[MOST_DEPTH];
    memset(requests, 0, sizeof(requests));
    for (long i = 0; i < depth; i++) {
        void *buffer;
        if (posix_memalign(&buffer, 4096, block))
            die("memory");
        memset(buffer, (int)i, block);
        requests[i].aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        requests[i].aio_fildes = disk;
        requests[i].aio_buf = (uintptr_t)buffer;
        requests[i].aio_nbytes = block;
        requests[i].aio_data = i;
        pointers[i] = &requests[i];
    }

    double begun = now(), end = begun + seconds;
    uint64_t done = 0, failed = 0;
    long ready = depth, flying = 0;
    while (ready || flying) {
        for (long i = 0; i < ready; i++)
            pointers[i]->aio_offset = (sequential ? at++ % blocks : next_random() % blocks) * block;
        for (long sent = 0; sent < ready;) {
            long count = syscall(SYS_io_submit, context, ready - sent, pointers + sent);
            if (count < 0)
                die("io_submit");
            sent += count;
        }
        flying += ready;
        ready = 0;
        long count = syscall(SYS_io_getevents, context, 1, flying, events, NULL);
        if (count < 0)
            die("io_getevents");
        flying -= count;
        int more = now() < end;
        for (long i = 0; i < count; i++) {
            done++;
            failed += events[i].res != (int64_t)block;
            if (more)
                pointers[ready++] = &requests[events[i].data];
        }
    }
    double spent = now() - begun;
    printf("{\"requests\": %llu, \"failed\": %llu, \"seconds\": %.3f, \"iops\": %.0f, \"mb_s\": %.1f}\n",
           (unsigned long long)done, (unsigned long long)failed, spent, done / spent, done * block / spent / 1e6);
    return failed != 0;
}
