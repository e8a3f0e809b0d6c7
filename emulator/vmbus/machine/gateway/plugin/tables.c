/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Look-ups in the tables that the emulator writes, under its sequence lock. If an emulator died while it wrote a
 * table, the sequence number stays odd, and every look-up fails until the next emulator has written the tables.
 */
#include "gateway.h"

static bool tables_begin(uint32_t *sequence)
{
    *sequence = atomic_load_explicit(&gateway.control->table_sequence, memory_order_acquire);
    return !(*sequence & 1);
}

static bool tables_unchanged(uint32_t sequence)
{
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&gateway.control->table_sequence, memory_order_relaxed) == sequence;
}

static uint32_t bounded(uint32_t count, uint32_t limit)
{
    return count < limit ? count : limit;
}

bool tables_cpuid(uint32_t leaf, struct gateway_cpuid *found)
{
    const struct gateway_control *control = gateway.control;
    uint32_t sequence;

    if (!tables_begin(&sequence)) {
        return false;
    }
    *found = (struct gateway_cpuid){ .leaf = leaf };
    uint32_t count = bounded(control->cpuid_count, GATEWAY_CPUID_LEAVES);
    for (uint32_t i = 0; i < count; i++) {
        if (control->cpuid[i].leaf == leaf) {
            *found = control->cpuid[i];
            break;
        }
    }
    return tables_unchanged(sequence);
}

bool tables_doorbell(uint64_t control_word, uint64_t input, uint32_t *doorbell, uint64_t *result)
{
    const struct gateway_control *control = gateway.control;
    uint32_t sequence;

    if (!tables_begin(&sequence)) {
        return false;
    }
    uint32_t count = bounded(control->rule_count, GATEWAY_RULES);
    for (uint32_t i = 0; i < count; i++) {
        struct gateway_rule rule = control->rules[i];
        uint64_t offset = input - rule.base;
        if (rule.control == control_word && offset < rule.count && rule.first < GATEWAY_DOORBELLS &&
            offset < GATEWAY_DOORBELLS - rule.first) {
            *doorbell = rule.first + (uint32_t)offset;
            *result = rule.result;
            return tables_unchanged(sequence);
        }
    }
    return false;
}

bool tables_gone(uint32_t code, uint32_t *status)
{
    const struct gateway_control *control = gateway.control;
    uint32_t sequence;

    if (!tables_begin(&sequence)) {
        return false;
    }
    uint32_t count = bounded(control->gone_count, GATEWAY_GONE);
    for (uint32_t i = 0; i < count; i++) {
        if (control->gone[i].code == code) {
            *status = control->gone[i].status;
            return tables_unchanged(sequence);
        }
    }
    return false;
}

bool tables_msr(uint32_t msr, unsigned int vcpu, uint64_t *value)
{
    const struct gateway_control *control = gateway.control;
    uint32_t sequence;

    if (!tables_begin(&sequence)) {
        return false;
    }
    uint32_t count = bounded(control->msr_count, GATEWAY_MSRS);
    for (uint32_t i = 0; i < count; i++) {
        struct gateway_msr found = control->msrs[i];
        if (found.msr == msr) {
            *value = found.value + (found.flags & MSR_ADD_VCPU ? vcpu : 0);
            return tables_unchanged(sequence);
        }
    }
    return false;
}

bool tables_post(struct gateway_post_rule *rule)
{
    const struct gateway_control *control = gateway.control;
    uint32_t sequence;

    if (!tables_begin(&sequence) || !control->post_count) {
        return false;
    }
    *rule = control->posts[0];
    return tables_unchanged(sequence);
}

/* Return whether all of `size` bytes at a guest physical address are RAM. */
bool tables_ram(uint64_t address, uint64_t size)
{
    const struct gateway_control *control = gateway.control;
    uint32_t sequence;

    if (!tables_begin(&sequence)) {
        return false;
    }
    uint32_t count = bounded(control->ram_count, GATEWAY_RAM);
    for (uint32_t i = 0; i < count; i++) {
        struct gateway_ram ram = control->ram[i];
        if (address >= ram.start && ram.size >= size && address - ram.start <= ram.size - size) {
            return tables_unchanged(sequence);
        }
    }
    return false;
}
