/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Trap gateway: a TCG plug-in that passes CPUID, RDMSR, WRMSR and VMCALL of a guest to an emulator process.
 *
 * The plug-in contains no VMBus code. It answers CPUID leaves and doorbells from tables that the emulator has
 * written; every other trap becomes a request in shared memory (slots.c), and the vCPU executes the instruction
 * again until it is answered. docs/gateway.md describes the protocol, shared.h the layout.
 *
 *      gateway.c      loading
 *      translation.c  finds the instructions in guest code, marks the pages that contain code
 *      traps.c        emulates them
 *      idle.c         interrupts that a vCPU raises by itself before it halts
 *      apic.c         the local APIC of a vCPU
 *      interrupts.c   actions when the guest is interrupted or faults
 *      resets.c       counts resets of the machine
 *      slots.c        requests and their answers
 *      posts.c        traps that are answered at once and handled later
 *      tables.c       look-ups in the tables that the emulator writes
 *      clock.c        guest TSC against host TSC
 *      registers.c    guest registers
 *      listener.c     the socket that an emulator attaches to
 *      memory.c       the shared region
 *      journal.c      memory that outlives emulators
 */
#include "gateway.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_CODE_PAGES (UINT64_C(1) << (40 - PAGE_SHIFT)) /* 1 TiB */

PLUGIN_EXPORT int qemu_plugin_version = PLUGIN_API_VERSION;

struct gateway gateway = {
    .wait = true,
    .engine_fd = -1,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .clock_lock = PTHREAD_MUTEX_INITIALIZER,
    .post_lock = PTHREAD_MUTEX_INITIALIZER,
};

static void on_resume(unsigned int index, void *userdata)
{
    (void)userdata;
    if (index < gateway.vcpus_max && gateway.vcpus[index].ready) {
        clock_arm(index, &gateway.vcpus[index]);
    }
}

static void on_vcpu(unsigned int index, void *userdata)
{
    (void)userdata;
    if (index >= gateway.vcpus_max) {
        fprintf(stderr, "vmbus gateway: vCPU %u is not served: QEMU announced only %u vCPUs at start\n", index,
                gateway.vcpus_max);
        return;
    }
    struct vcpu_state *vcpu = &gateway.vcpus[index];
    if (!vcpu->buffer) {
        vcpu->buffer = g_byte_array_new();
    }
    vcpu->shared = (struct gateway_vcpu *)(gateway.region + gateway.control->vcpu_offset) + index;
    vcpu->requests = (_Atomic uint64_t *)(gateway.region + gateway.control->request_offset) +
                     (size_t)index * GATEWAY_SLOTS;
    if (!registers_find(vcpu)) {
        exit(1);
    }
    idle_start(vcpu);
    vcpu->shared->present = 1;
    vcpu->ready = true;
    if (!translation_thread(vcpu)) {
        gateway.one_thread = true;
    }
    uint32_t seen = atomic_load(&gateway.control->vcpus);
    while (seen <= index && !atomic_compare_exchange_weak(&gateway.control->vcpus, &seen, index + 1)) {
    }
}

static void on_exit_of_qemu(void *userdata)
{
    (void)userdata;
    listener_unlink();
}

static bool parse_arguments(int argc, char **argv, uint64_t *code_pages)
{
    for (int i = 0; i < argc; i++) {
        const char *value = strchr(argv[i], '=');
        size_t length = value ? (size_t)(value - argv[i]) : strlen(argv[i]);

        value = value ? value + 1 : "";
        if (length == 6 && strncmp(argv[i], "socket", length) == 0 && *value) {
            gateway.socket_path = value;
        } else if (length == 4 && strncmp(argv[i], "wait", length) == 0 &&
                   (strcmp(value, "on") == 0 || strcmp(value, "off") == 0)) {
            gateway.wait = strcmp(value, "on") == 0;
        } else if (length == 9 && strncmp(argv[i], "ram-limit", length) == 0) {
            char *end;
            unsigned long gigabytes = strtoul(value, &end, 10);
            if (*end || !gigabytes || gigabytes > 65536) {
                fprintf(stderr, "vmbus gateway: ram-limit must be a number of GiB from 1 to 65536\n");
                return false;
            }
            *code_pages = (uint64_t)gigabytes << (30 - PAGE_SHIFT);
        } else {
            fprintf(stderr, "vmbus gateway: unknown argument %s (socket=PATH, wait=on|off, ram-limit=GiB)\n",
                    argv[i]);
            return false;
        }
    }
    if (!gateway.socket_path) {
        fprintf(stderr, "vmbus gateway: the argument socket=PATH is required\n");
        return false;
    }
    return true;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    uint64_t code_pages = DEFAULT_CODE_PAGES;

    if (info->version.min > PLUGIN_API_VERSION || info->version.cur < PLUGIN_API_VERSION) {
        fprintf(stderr,
                "vmbus gateway: needs plug-in interface %d, this QEMU has %d to %d: use QEMU 11.1 or newer\n",
                PLUGIN_API_VERSION, info->version.min, info->version.cur);
        return 1;
    }
    if (!info->system_emulation || strcmp(info->target_name, "x86_64") != 0) {
        fprintf(stderr, "vmbus gateway: works only with qemu-system-x86_64\n");
        return 1;
    }
    if (!parse_arguments(argc, argv, &code_pages)) {
        return 1;
    }
    gateway.vcpus_max = (unsigned int)info->system.max_vcpus;
    gateway.vcpus = calloc(gateway.vcpus_max, sizeof(*gateway.vcpus));
    if (!gateway.vcpus || !memory_create(gateway.vcpus_max, code_pages)) {
        return 1;
    }
    clock_start();
    gateway.sampling = (qemu_plugin_u64){ .score = qemu_plugin_scoreboard_new(sizeof(uint64_t)) };
    if (!listener_start()) {
        return 1;
    }
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu, NULL);
    qemu_plugin_register_vcpu_resume_cb(id, on_resume, NULL);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, NULL);
    qemu_plugin_register_vcpu_discon_cb(id, QEMU_PLUGIN_DISCON_INTERRUPT | QEMU_PLUGIN_DISCON_EXCEPTION,
                                        on_discontinuity, NULL);
    qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
    return 0;
}
