/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The gateway plug-in over a stand-in for QEMU. The first byte of an input says what the others are:
 *
 *      odd          what a peer sends to the listener
 *      0 modulo 4   a translation block: flags, page offset, and instructions as a length and their bytes
 *      2 modulo 4   the same with a `struct scene` in between: the block is executed, too
 *                   bit 2 of the byte: the block is at the reset vector; bit 3: in real mode
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fuzz.h"
#include "gateway.h"
#include "stub.h"

static struct sockaddr_un address = { .sun_family = AF_UNIX };

static void leave(void)
{
    unlink(address.sun_path);
}

static void prepare(void)
{
    static char option[128];
    static char *arguments[] = { option, "wait=off" };
    qemu_info_t info = {
        .target_name = "x86_64",
        .version = { .min = PLUGIN_API_VERSION, .cur = PLUGIN_API_VERSION },
        .system_emulation = true,
        .system = { .smp_vcpus = 1, .max_vcpus = 1 },
    };

    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/vmbus-fuzz-%d.sock", getpid());
    snprintf(option, sizeof(option), "socket=%s", address.sun_path);
    if (qemu_plugin_install(1, &info, 2, arguments) != 0)
        abort();
    atexit(leave);
    stub_current = &stub_vcpus[0];
    stub_on_vcpu(0, NULL);
}

static void listener(const uint8_t *data, size_t size)
{
    char answer[64];
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0) {
        ssize_t sent = send(fd, data, size > 512 ? 512 : size, MSG_NOSIGNAL);
        (void)sent;
        shutdown(fd, SHUT_WR);
        while (recv(fd, answer, sizeof(answer), 0) > 0) { /* until the listener has read all, and closes */
        }
    }
    close(fd);
}

/* What a block finds when it is executed: the emulator's side of the shared memory, and the guest's registers. */
struct __attribute__((packed)) scene {
    uint8_t emulator;      /* bits 0-1: enum gateway_emulator; bit 2: it was active; bit 3: it writes its tables */
    uint8_t answers;       /* bits 0-1: verdict; bit 2: there are answers; bit 3: nobody answers for a while */
    uint8_t event;         /* bit 0: an interrupt follows; bit 1: an exception; bit 2: x2APIC; bit 3: sampling;
                              bit 4: a constant MSR differs by vCPU; bit 5: HLT polls; bit 6: MSIs reach the vCPU;
                              bit 7: `ended` is pending */
    uint8_t vector, ended; /* in service, and to be ended by the gateway */
    uint32_t rax, rbx, rcx, rdx, r8;
    uint8_t posts;     /* bits 0-1: messages that are promised; bit 2: EOM is; bit 3: the ring is full; bit 4: what the
                          emulator says of the ring cannot be; bit 5: RAM ends in the middle of an input */
    uint8_t input[20]; /* of HvPostMessage, at the start of RAM: before its payload, and the payload's first word */
};

enum { UNANSWERED = 2 }; /* traps of a block that wait for an answer in vain, a millisecond each */

static void check(int right)
{
    if (!right)
        abort();
}

static void arrange(const struct scene *scene)
{
    struct gateway_control *control = gateway.control;
    struct stub_vcpu *vcpu = stub_current;
    struct vcpu_state *state = &gateway.vcpus[0];

    control->emulator = scene->emulator & 3;
    control->was_active = scene->emulator >> 2 & 1;
    control->table_sequence = scene->emulator >> 3 & 1;
    control->hold_timeout_ms = scene->answers >> 3 & 1;
    control->cpuid_count = control->rule_count = control->gone_count = 1;
    control->cpuid[0] = (struct gateway_cpuid){ .leaf = 0x40000000, .eax = 0x40000005 };
    control->rules[0] = (struct gateway_rule){ .control = 0x5d, .base = 0x100, .count = scene->r8, .first = 8190 };
    control->gone[0] = (struct gateway_gone){ .code = 0x5c, .status = 0x33 };
    control->msr_count = 1;
    control->msrs[0] = (struct gateway_msr){ .msr = 0x40000002, .flags = scene->event >> 4 & 1, .value = 7 };
    control->poll_ns = scene->event >> 5 & 1 ? 20000 : 0;
    state->idle.window_ns = 20000;
    state->shared->msi_address = scene->event >> 6 & 1 ? 0xfee00000 : 0;
    for (int word = 0; word < 4; word++)
        state->shared->pending[word] = (scene->event >> 7 & 1 && word == scene->ended >> 6)
                                           ? UINT64_C(1) << (scene->ended & 63)
                                           : 0;
    control->owner = 1;
    control->post_count = control->ram_count = 1;
    control->posts[0] = (struct gateway_post_rule){
        .control = 0x5c,
        .messages = 0x300,
        .connections = 0x12,
        .msr = 0x40000084,
    };
    control->ram[0] = (struct gateway_ram){ .start = STUB_RAM_START,
                                            .size = scene->posts >> 5 & 1 ? 128 : STUB_RAM_SIZE };
    memset(stub_ram, 0xa5, sizeof(stub_ram));
    memcpy(stub_ram, scene->input, sizeof(scene->input));
    gateway.posts->tail = gateway.post_head - (scene->posts >> 3 & 1 ? GATEWAY_POSTS : 0);
    gateway.posts->tail += scene->posts >> 4 & 1 ? UINT64_C(1) << 40 : 0;
    gateway.posts->promise =
        (uint64_t)(uint32_t)(gateway.post_head + (scene->posts & 3)) << 32 | ((scene->posts & 7) != 0);
    for (int slot = 0; slot < GATEWAY_SLOTS; slot++) {
        struct gateway_answer *answer = &state->shared->answers[slot];
        state->slots[slot].busy = false;
        answer->sequence = state->slots[slot].sequence + (scene->answers >> 2 & 1);
        answer->verdict = scene->answers & 3;
        answer->value = ~UINT64_C(0);
    }
    for (int word = 0; word < 4; word++)
        state->shared->auto_eoi[word] = word == scene->ended >> 6 ? UINT64_C(1) << (scene->ended & 63) : 0;
    memset(vcpu->in_service, 0, sizeof(vcpu->in_service));
    vcpu->in_service[scene->vector >> 5] = UINT32_C(1) << (scene->vector & 31);
    vcpu->x2apic = scene->event >> 2 & 1;
    vcpu->registers[STUB_RAX] = scene->rax;
    vcpu->registers[STUB_RBX] = scene->rbx;
    vcpu->registers[STUB_RCX] = scene->rcx;
    vcpu->registers[STUB_RDX] = scene->rdx;
    vcpu->registers[STUB_R8] = scene->r8;
}

static void execute(struct qemu_plugin_tb *tb, const struct scene *scene)
{
    struct gateway_control before = *gateway.control;
    struct stub_vcpu *vcpu = stub_current;
    const uint64_t head = gateway.posts->head;
    unsigned int messages = 0;
    const uint64_t untouched = UINT64_C(1) << STUB_CS | UINT64_C(1) << STUB_CR0 | UINT64_C(1) << STUB_R15;
    uint64_t registers[STUB_REGISTERS];
    volatile int waits = 0;

    memcpy(registers, vcpu->registers, sizeof(registers));
    if (tb->callback)
        tb->callback(0, NULL);
    check(gateway.control->resets == before.resets + (tb->callback != NULL));
    for (volatile size_t i = 0; i < tb->count; i++) {
        struct qemu_plugin_insn *insn = &tb->insns[i];
        for (int each = 0; each < insn->conditionals && scene->event & 8; each++)
            insn->conditional[each](0, NULL);
        if (!insn->callback || waits > UNANSWERED)
            continue;
        waits += !(scene->answers & 4);
        if (setjmp(vcpu->way_out) == 0)
            insn->callback(0, insn->userdata);
    }
    for (int each = 0; each < STUB_REGISTERS; each++)
        check(!(untouched >> each & 1) || registers[each] == vcpu->registers[each]);
    if (scene->event & 2)
        stub_on_discontinuity(0, QEMU_PLUGIN_DISCON_EXCEPTION, vcpu->registers[STUB_RIP], 0, NULL);
    if (scene->event & 1)
        stub_on_discontinuity(0, QEMU_PLUGIN_DISCON_INTERRUPT, vcpu->registers[STUB_RIP], 0, NULL);
    /* What is posted was promised, and fits. */
    check(gateway.posts->head == gateway.post_head && gateway.post_head - head <= GATEWAY_POSTS);
    check(!(scene->posts & 0x18) || gateway.post_head == head);
    for (uint64_t each = head; each != gateway.post_head; each++) {
        const struct gateway_post *post = &gateway.posts->entries[each % GATEWAY_POSTS];
        check(post->vcpu == 0 && post->size <= GATEWAY_POST_PAYLOAD);
        messages += post->kind == KIND_VMCALL;
        check(post->kind == KIND_WRMSR ? post->connection == 0 : post->kind == KIND_VMCALL && 0x12 >> post->connection & 1);
    }
    check(messages <= (scene->posts & 3u));
    /* What is constant, and what the emulator writes, is as before. */
    check(memcmp(&before, gateway.control, offsetof(struct gateway_control, vcpus)) == 0);
    check(memcmp(before.cpuid, gateway.control->cpuid, sizeof(before) - offsetof(struct gateway_control, cpuid)) == 0);
    check(before.table_sequence == gateway.control->table_sequence);
}

static void translation(const uint8_t *data, size_t size)
{
    struct stub_vcpu *vcpu = stub_current;
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));
    struct scene scene = { 0 };
    size_t at = 4;
    const bool vector = data[0] & 4, real = data[0] & 8;

    if (data[0] & 2 && size >= at + sizeof(scene)) {
        memcpy(&scene, data + at, sizeof(scene));
        at += sizeof(scene);
    }

    tb->vaddr = vector ? 0xfffffff0 : 0x7000 + (data[2] | (uint64_t)data[3] << 8);
    while (at < size && tb->count < STUB_INSNS) {
        size_t length = 1 + data[at] % 15;
        uint8_t bytes[16] = { 0 };
        at++;
        memcpy(bytes, data + at, length < size - at ? length : size - at);
        stub_add_insn(tb, bytes, length);
        at += length;
    }
    vcpu->long_mode = data[1] & 1;
    vcpu->registers[STUB_CR0] = !real;
    vcpu->registers[STUB_CS] = 8 | (data[1] >> 1 & 3);
    vcpu->registers[STUB_RIP] = (vector ? 0xfff0 : tb->vaddr) + (data[1] >> 3);
    if (data[0] & 2)
        arrange(&scene);
    stub_on_translation(tb, NULL);
    check((tb->callback != NULL) == (vector && real && !(data[1] >> 3)));
    if (data[0] & 2)
        execute(tb, &scene);
    free(tb);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!stub_current)
        prepare();
    if (size < 5)
        return 0;
    if (data[0] & 1)
        listener(data + 1, size - 1);
    else
        translation(data, size);
    return 0;
}
