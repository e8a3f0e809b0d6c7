/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Guest registers, by their names in QEMU's gdb description. */
#include "gateway.h"

#include <stdio.h>
#include <string.h>

#define CR0_PE UINT64_C(1)
#define EFLAGS_VM (UINT64_C(1) << 17)

static const char *const register_names[GUEST_COUNT] = {
    [GUEST_RAX] = "rax", [GUEST_RBX] = "rbx", [GUEST_RCX] = "rcx", [GUEST_RDX] = "rdx",       [GUEST_RSI] = "rsi",
    [GUEST_RDI] = "rdi", [GUEST_R8] = "r8",   [GUEST_R15] = "r15", [GUEST_RSP] = "rsp",       [GUEST_RIP] = "rip",
    [GUEST_CS] = "cs",   [GUEST_CR0] = "cr0", [GUEST_EFLAGS] = "eflags",
};

bool registers_find(struct vcpu_state *vcpu)
{
    GArray *found = qemu_plugin_get_registers();
    const qemu_plugin_reg_descriptor *descriptors = (const void *)found->data;

    memset(vcpu->registers, 0, sizeof(vcpu->registers));
    for (unsigned int i = 0; i < found->len; i++) {
        for (int which = 0; which < GUEST_COUNT; which++) {
            if (!vcpu->registers[which] && strcmp(descriptors[i].name, register_names[which]) == 0) {
                vcpu->registers[which] = descriptors[i].handle;
            }
        }
    }
    g_array_free(found, 1);
    for (int which = 0; which < GUEST_COUNT; which++) {
        if (!vcpu->registers[which]) {
            fprintf(stderr, "vmbus gateway: this QEMU does not provide the register %s\n", register_names[which]);
            return false;
        }
    }
    return true;
}

uint64_t register_read(struct vcpu_state *vcpu, enum gateway_register which)
{
    GByteArray *buffer = vcpu->buffer;
    uint64_t value = 0;

    g_byte_array_set_size(buffer, 0);
    if (qemu_plugin_read_register(vcpu->registers[which], buffer)) {
        memcpy(&value, buffer->data, buffer->len < sizeof(value) ? buffer->len : sizeof(value));
    }
    return value;
}

void register_write(struct vcpu_state *vcpu, enum gateway_register which, uint64_t value)
{
    GByteArray *buffer = vcpu->buffer;

    g_byte_array_set_size(buffer, sizeof(value));
    memcpy(buffer->data, &value, sizeof(value));
    qemu_plugin_write_register(vcpu->registers[which], buffer);
}

/*
 * Return whether the vCPU runs 64-bit code (CS.L and EFER.LMA). The descriptor cache of CS cannot be read, but R15
 * can be written only in 64-bit code; elsewhere writes are dropped.
 */
bool registers_long_mode(struct vcpu_state *vcpu)
{
    uint64_t before = register_read(vcpu, GUEST_R15);

    if (before) {
        return true; /* R15 reads as 0 outside 64-bit code */
    }
    register_write(vcpu, GUEST_R15, 1);
    bool long_mode = register_read(vcpu, GUEST_R15) == 1;
    register_write(vcpu, GUEST_R15, 0);
    return long_mode;
}

bool registers_real_mode(struct vcpu_state *vcpu)
{
    return !(register_read(vcpu, GUEST_CR0) & CR0_PE);
}

/* Return whether the current privilege level is 0. */
bool registers_privileged(struct vcpu_state *vcpu)
{
    if (registers_real_mode(vcpu)) {
        return true; /* the selector does not contain a privilege level */
    }
    if (register_read(vcpu, GUEST_EFLAGS) & EFLAGS_VM) {
        return false;
    }
    return (register_read(vcpu, GUEST_CS) & 3) == 0;
}
