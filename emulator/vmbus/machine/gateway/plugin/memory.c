/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The shared region: a sparse memfd of sealed size that exists as long as QEMU. */
#define _GNU_SOURCE
#include "gateway.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE UINT64_C(4096)
#define DEFAULT_SPIN_NS 50000

static uint64_t whole_pages(uint64_t size)
{
    return (size + PAGE - 1) & ~(PAGE - 1);
}

bool memory_create(unsigned int vcpus_max, uint64_t code_pages)
{
    uint64_t vcpu_offset = whole_pages(sizeof(struct gateway_control));
    uint64_t request_offset = vcpu_offset + whole_pages(vcpus_max * sizeof(struct gateway_vcpu));
    uint64_t doorbell_offset = request_offset + whole_pages(vcpus_max * UINT64_C(8) * GATEWAY_SLOTS);
    uint64_t post_offset = doorbell_offset + whole_pages(GATEWAY_DOORBELLS);
    uint64_t code_offset = post_offset + whole_pages(sizeof(struct gateway_posts));
    uint64_t region_size = code_offset + whole_pages(code_pages);

    int memory_fd = memfd_create("vmbus-gateway", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memory_fd < 0) {
        fprintf(stderr, "vmbus gateway: memfd_create: %s\n", strerror(errno));
        return false;
    }
    void *region = MAP_FAILED;
    if (ftruncate(memory_fd, (off_t)region_size) == 0 &&
        fcntl(memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
        region = mmap(NULL, region_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory_fd, 0);
    }
    int event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (region == MAP_FAILED || event_fd < 0) {
        fprintf(stderr, "vmbus gateway: cannot create shared memory of %llu bytes: %s\n",
                (unsigned long long)region_size, strerror(errno));
        if (region != MAP_FAILED) {
            munmap(region, region_size);
        }
        if (event_fd >= 0) {
            close(event_fd);
        }
        close(memory_fd);
        return false;
    }

    struct gateway_control *control = region;
    control->version = GATEWAY_VERSION;
    control->vcpus_max = vcpus_max;
    control->region_size = region_size;
    control->vcpu_offset = vcpu_offset;
    control->request_offset = request_offset;
    control->doorbell_offset = doorbell_offset;
    control->post_offset = post_offset;
    control->code_offset = code_offset;
    control->code_pages = code_pages;
    control->journal_size = GATEWAY_JOURNAL_SIZE;
    /* With one processor, a vCPU that spins would keep the emulator from running. */
    atomic_store(&control->spin_ns, sysconf(_SC_NPROCESSORS_ONLN) > 1 ? DEFAULT_SPIN_NS : 0);
    control->magic = GATEWAY_MAGIC;

    gateway.control = control;
    gateway.region = region;
    gateway.region_size = region_size;
    gateway.doorbells = gateway.region + doorbell_offset;
    gateway.posts = (struct gateway_posts *)(gateway.region + post_offset);
    gateway.code = gateway.region + code_offset;
    gateway.code_pages = code_pages;
    gateway.memory_fd = memory_fd;
    gateway.event_fd = event_fd;
    return true;
}
