/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "stub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct stub_vcpu stub_vcpus[STUB_VCPUS];
uint8_t stub_ram[STUB_RAM_SIZE];
_Thread_local struct stub_vcpu *stub_current;

qemu_plugin_vcpu_udata_cb_t stub_on_vcpu, stub_on_resume;
qemu_plugin_vcpu_tb_trans_cb_t stub_on_translation;
qemu_plugin_vcpu_discon_cb_t stub_on_discontinuity;
qemu_plugin_udata_cb_t stub_on_exit;

static const char *const names[STUB_REGISTERS] = {
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r15", "rsp", "rip", "eflags", "cs", "cr0",
};

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "stub: %s\n", what);
        abort();
    }
}

/* ---- GLib ---- */

GByteArray *g_byte_array_new(void)
{
    return calloc(1, sizeof(GByteArray));
}

GByteArray *g_byte_array_set_size(GByteArray *array, unsigned int length)
{
    /* Exactly as large as asked for, so that the sanitizer sees every byte beyond. */
    uint8_t *data = realloc(array->data, length ? length : 1);
    require(data != NULL, "out of memory");
    if (length > array->len) {
        memset(data + array->len, 0xa5, length - array->len);
    }
    array->data = data;
    array->len = length;
    return array;
}

char *g_array_free(GArray *array, int free_segment)
{
    require(free_segment, "the array's content would leak");
    free(array->data);
    free(array);
    return NULL;
}

/* ---- registers ---- */

static int number(struct qemu_plugin_register *handle)
{
    return (int)((uintptr_t)handle - 1);
}

static bool only_in_long_mode(int which)
{
    return which == STUB_R8 || which == STUB_R15;
}

GArray *qemu_plugin_get_registers(void)
{
    require(stub_current != NULL, "no current vCPU");
    GArray *array = calloc(1, sizeof(*array));
    qemu_plugin_reg_descriptor *found = calloc(STUB_REGISTERS, sizeof(*found));
    for (int i = 0; i < STUB_REGISTERS; i++) {
        found[i] = (qemu_plugin_reg_descriptor){
            .handle = (struct qemu_plugin_register *)(uintptr_t)(i + 1),
            .name = names[i],
        };
    }
    array->data = (char *)found;
    array->len = STUB_REGISTERS;
    return array;
}

bool qemu_plugin_read_register(struct qemu_plugin_register *handle, GByteArray *value)
{
    int which = number(handle);
    uint64_t content = stub_current->registers[which];
    unsigned int before = value->len, size = which == STUB_CS || which == STUB_EFLAGS ? 4 : 8;

    if (!stub_current->long_mode && which <= STUB_RIP) {
        content = only_in_long_mode(which) ? 0 : (uint32_t)content;
    }
    g_byte_array_set_size(value, before + size);
    memcpy(value->data + before, &content, size);
    return true;
}

bool qemu_plugin_write_register(struct qemu_plugin_register *handle, GByteArray *value)
{
    int which = number(handle);
    uint64_t content;

    require(which != STUB_RIP, "the program counter is read-only");
    require(value->len >= sizeof(content), "too short for a register");
    memcpy(&content, value->data, sizeof(content));
    if (stub_current->long_mode) {
        stub_current->registers[which] = content;
    } else if (!only_in_long_mode(which)) {
        stub_current->registers[which] = (uint32_t)content;
    }
    return true;
}

void qemu_plugin_set_pc(uint64_t pc)
{
    stub_current->registers[STUB_RIP] = pc;
    longjmp(stub_current->way_out, 1);
}

/* ---- memory: identity mapping, a little RAM, and a local APIC ---- */

bool qemu_plugin_translate_vaddr(uint64_t vaddr, uint64_t *hwaddr)
{
    *hwaddr = vaddr;
    return vaddr < UINT64_C(1) << 52;
}

enum qemu_plugin_hwaddr_operation_result qemu_plugin_read_memory_hwaddr(uint64_t address, GByteArray *data,
                                                                        size_t length)
{
    uint64_t word = (address - 0xfee00100) / 0x10;
    uint32_t value;

    if (address >= STUB_RAM_START && length <= STUB_RAM_SIZE && address - STUB_RAM_START <= STUB_RAM_SIZE - length) {
        g_byte_array_set_size(data, (unsigned int)length);
        memcpy(data->data, stub_ram + (address - STUB_RAM_START), length);
        return QEMU_PLUGIN_HWADDR_OPERATION_OK;
    }
    if (length != 4 || word >= 24 || (word >= 8 && word < 16)) {
        return QEMU_PLUGIN_HWADDR_OPERATION_INVALID_ADDRESS;
    }
    value = word < 8 ? stub_current->in_service[word] : atomic_load(&stub_current->requested[word - 16]);
    g_byte_array_set_size(data, 4);
    memcpy(data->data, &value, 4);
    if (stub_current->x2apic) {
        memset(data->data, 0xff, 4);
    }
    return QEMU_PLUGIN_HWADDR_OPERATION_OK;
}

enum qemu_plugin_hwaddr_operation_result qemu_plugin_write_memory_hwaddr(uint64_t address, GByteArray *data)
{
    require(data->len == 4, "an APIC register has four bytes");
    if (address == (0xfee00000 | (uint64_t)(stub_current - stub_vcpus) << 12)) {
        uint32_t vector;
        memcpy(&vector, data->data, 4);
        require(vector < 256, "no vector");
        if (stub_current->deaf) {
            return QEMU_PLUGIN_HWADDR_OPERATION_DEVICE_ERROR;
        }
        stub_current->raised++;
        stub_interrupt(stub_current, vector);
        return QEMU_PLUGIN_HWADDR_OPERATION_OK;
    }
    require(address == 0xfee000b0, "only EOI, and MSIs to this vCPU, may be written");
    for (int word = 7; word >= 0; word--) {
        if (stub_current->in_service[word]) {
            stub_current->in_service[word] &= ~(UINT32_C(1) << (31 - __builtin_clz(stub_current->in_service[word])));
            break;
        }
    }
    return QEMU_PLUGIN_HWADDR_OPERATION_OK;
}

/* What QEMU's main loop does with an MSI, and the vCPU's thread with its own. */
void stub_interrupt(struct stub_vcpu *vcpu, uint32_t vector)
{
    atomic_fetch_or(&vcpu->requested[vector / 32], UINT32_C(1) << vector % 32);
}

/* ---- translation ---- */

void stub_add_insn(struct qemu_plugin_tb *tb, const uint8_t *bytes, size_t size)
{
    require(tb->count < STUB_INSNS && size <= sizeof(tb->insns[0].bytes), "block too long");
    struct qemu_plugin_insn *insn = &tb->insns[tb->count];
    *insn = (struct qemu_plugin_insn){ .vaddr = tb->vaddr, .size = size };
    if (tb->count) {
        insn->vaddr = insn[-1].vaddr + insn[-1].size;
    }
    memcpy(insn->bytes, bytes, size);
    tb->count++;
}

size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb)
{
    return tb->count;
}

uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb)
{
    return tb->vaddr;
}

struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index)
{
    return (struct qemu_plugin_insn *)&tb->insns[index];
}

size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *data, size_t length)
{
    size_t copied = length < insn->size ? length : insn->size;
    memcpy(data, insn->bytes, copied);
    return copied;
}

size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *insn)
{
    return insn->size;
}

uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn)
{
    return insn->vaddr;
}

void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, qemu_plugin_vcpu_udata_cb_t cb,
                                            enum qemu_plugin_cb_flags flags, void *userdata)
{
    require(!insn->callback, "two callbacks on one instruction");
    insn->callback = cb;
    insn->flags = flags;
    insn->userdata = userdata;
}

void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, qemu_plugin_vcpu_udata_cb_t cb,
                                          enum qemu_plugin_cb_flags flags, void *userdata)
{
    (void)userdata;
    require(!tb->callback, "two callbacks on one block");
    require(flags == QEMU_PLUGIN_CB_NO_REGS, "registers that are not needed");
    tb->callback = cb;
}

void qemu_plugin_register_vcpu_insn_exec_cond_cb(struct qemu_plugin_insn *insn, qemu_plugin_vcpu_udata_cb_t cb,
                                                 enum qemu_plugin_cb_flags flags, enum qemu_plugin_cond cond,
                                                 qemu_plugin_u64 entry, uint64_t imm, void *userdata)
{
    (void)flags;
    (void)userdata;
    require(cond == QEMU_PLUGIN_COND_NE && imm == 0 && entry.offset == 0, "not the condition that is expected");
    require(insn->conditionals < 2, "too many conditional callbacks");
    insn->conditional[insn->conditionals++] = cb;
}

struct qemu_plugin_scoreboard *qemu_plugin_scoreboard_new(size_t element_size)
{
    require(element_size == sizeof(uint64_t), "one word a vCPU");
    return (struct qemu_plugin_scoreboard *)stub_vcpus;
}

void qemu_plugin_u64_set(qemu_plugin_u64 entry, unsigned int vcpu, uint64_t value)
{
    require((void *)entry.score == (void *)stub_vcpus && stub_current == &stub_vcpus[vcpu], "another vCPU's word");
    stub_vcpus[vcpu].sampling = value;
}

/* ---- registration ---- */

void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_udata_cb_t cb, void *userdata)
{
    (void)id;
    (void)userdata;
    stub_on_vcpu = cb;
}

void qemu_plugin_register_vcpu_resume_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_udata_cb_t cb, void *userdata)
{
    (void)id;
    (void)userdata;
    stub_on_resume = cb;
}

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_tb_trans_cb_t cb, void *userdata)
{
    (void)id;
    (void)userdata;
    stub_on_translation = cb;
}

void qemu_plugin_register_vcpu_discon_cb(qemu_plugin_id_t id, enum qemu_plugin_discon_type types,
                                         qemu_plugin_vcpu_discon_cb_t cb, void *userdata)
{
    (void)id;
    (void)userdata;
    require(types == (QEMU_PLUGIN_DISCON_INTERRUPT | QEMU_PLUGIN_DISCON_EXCEPTION), "both kinds are needed");
    stub_on_discontinuity = cb;
}

void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, qemu_plugin_udata_cb_t cb, void *userdata)
{
    (void)id;
    (void)userdata;
    stub_on_exit = cb;
}
