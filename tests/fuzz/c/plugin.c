/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The gateway plug-in over a stand-in for QEMU. An input that begins with an even byte is a translation block:
 * flags, page offset, and instructions as a length and their bytes. With an odd byte, it is what a peer sends to the
 * listener.
 */
#define _GNU_SOURCE
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

static void translation(const uint8_t *data, size_t size)
{
    struct stub_vcpu *vcpu = stub_current;
    struct qemu_plugin_tb *tb = calloc(1, sizeof(*tb));
    size_t at = 4;

    tb->vaddr = 0x7000 + (data[2] | (uint64_t)data[3] << 8);
    while (at < size && tb->count < STUB_INSNS) {
        size_t length = 1 + data[at] % 15;
        uint8_t bytes[16] = { 0 };
        at++;
        memcpy(bytes, data + at, length < size - at ? length : size - at);
        stub_add_insn(tb, bytes, length);
        at += length;
    }
    vcpu->long_mode = data[1] & 1;
    vcpu->registers[STUB_CR0] = 1;
    vcpu->registers[STUB_CS] = 8 | (data[1] >> 1 & 3);
    vcpu->registers[STUB_RIP] = tb->vaddr + (data[1] >> 3);
    stub_on_translation(tb, NULL);
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
