/*
 * Load on a disk, without the page cache: random or sequential, a fixed number of requests in flight.
 *
 *   disk_load --device /dev/sda [--block 4096] [--depth 32] [--seconds 5] [--jobs 1] [--write] [--sequential]
 *
 * Linux's native asynchronous I/O through raw system calls, so that no library is needed. With several jobs each is a
 * process on a processor of its own, with its own requests in flight. Prints one line of JSON for all of them.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_DEPTH = 256, MAX_JOBS = 16 };

struct load {
    const char *device;
    size_t block;
    long depth;
    double seconds;
    int writing, sequential;
};

struct result {
    uint64_t requests, failed;
    double seconds;
};

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

/* One job's part: the whole disk at random, or a stretch of its own one after another. */
static struct result run(const struct load *load, long job, long jobs)
{
    size_t block = load->block;
    int disk = open(load->device, (load->writing ? O_RDWR : O_RDONLY) | O_DIRECT);
    uint64_t size = 0;
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) < 0)
        die(load->device);
    uint64_t blocks = size / block, at = blocks / jobs * job;
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, load->depth, &context) < 0)
        die("io_setup");

    struct iocb requests[MAX_DEPTH], *pointers[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    memset(requests, 0, sizeof(requests));
    for (long i = 0; i < load->depth; i++) {
        void *buffer;
        if (posix_memalign(&buffer, 4096, block))
            die("memory");
        memset(buffer, (int)i, block);
        requests[i].aio_lio_opcode = load->writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        requests[i].aio_fildes = disk;
        requests[i].aio_buf = (uintptr_t)buffer;
        requests[i].aio_nbytes = block;
        requests[i].aio_data = i;
        pointers[i] = &requests[i];
    }

    double begun = now(), end = begun + load->seconds;
    struct result result = {0};
    long ready = load->depth, flying = 0;
    while (ready || flying) {
        for (long i = 0; i < ready; i++)
            pointers[i]->aio_offset = (load->sequential ? at++ % blocks : next_random() % blocks) * block;
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
            result.requests++;
            result.failed += events[i].res != (int64_t)block;
            if (more)
                pointers[ready++] = &requests[events[i].data];
        }
    }
    result.seconds = now() - begun;
    return result;
}

int main(int argc, char **argv)
{
    struct load load = {.device = "/dev/sda", .block = 4096, .depth = 32, .seconds = 5};
    long jobs = 1;

    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--write"))
            load.writing = 1;
        else if (!strcmp(argv[i], "--sequential"))
            load.sequential = 1;
        else if (i + 1 == argc)
            return 2;
        else if (!strcmp(argv[i], "--device"))
            load.device = argv[++i];
        else if (!strcmp(argv[i], "--block"))
            load.block = strtoul(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--depth"))
            load.depth = strtol(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--seconds"))
            load.seconds = strtod(argv[++i], NULL);
        else if (!strcmp(argv[i], "--jobs"))
            jobs = strtol(argv[++i], NULL, 0);
        else
            return 2;
    }
    if (load.depth < 1 || load.depth > MAX_DEPTH || load.block < 512 || jobs < 1 || jobs > MAX_JOBS)
        return 2;

    struct result all = {0};
    if (jobs == 1) {
        all = run(&load, 0, 1);
    } else {
        int pipes[2];
        if (pipe(pipes) < 0)
            die("pipe");
        for (long job = 0; job < jobs; job++) {
            pid_t child = fork();
            if (child < 0)
                die("fork");
            if (child == 0) {
                cpu_set_t set;
                CPU_ZERO(&set);
                CPU_SET(job, &set);
                if (sched_setaffinity(0, sizeof(set), &set) < 0)
                    die("sched_setaffinity");
                random_state += job * 7919;
                struct result mine = run(&load, job, jobs);
                if (write(pipes[1], &mine, sizeof(mine)) != sizeof(mine))
                    die("pipe");
                exit(0);
            }
        }
        close(pipes[1]);
        struct result mine;
        long reports = 0;
        while (read(pipes[0], &mine, sizeof(mine)) == sizeof(mine)) {
            reports++;
            all.requests += mine.requests;
            all.failed += mine.failed;
            if (mine.seconds > all.seconds)
                all.seconds = mine.seconds;
        }
        while (wait(NULL) > 0)
            ;
        if (reports != jobs)
            return 1;
    }
    printf("{\"requests\": %llu, \"failed\": %llu, \"seconds\": %.3f, \"iops\": %.0f, \"mb_s\": %.1f}\n",
           (unsigned long long)all.requests, (unsigned long long)all.failed, all.seconds,
           all.requests / all.seconds, all.requests * load.block / all.seconds / 1e6);
    return all.failed != 0;
}
