/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Posts: traps that are answered at once and handled later, in a ring that the emulator empties.
 *
 * Only what the emulator has promised to answer in this way, whatever it finds when it handles it, is posted; every
 * other trap becomes a request (slots.c), which does the same more slowly. So a promise may be withdrawn at any time,
 * and may be smaller than it could be. One lock orders the posts of all vCPUs: what is in the ring is in the order in
 * which it happened.
 */
#include "gateway.h"

#include <string.h>

/* The input of HvPostMessage. */
struct message_input {
    uint32_t connection;
    uint32_t reserved;
    uint32_t type;
    uint32_t size;
    uint8_t payload[GATEWAY_POST_PAYLOAD];
};

#define INPUT_ALIGNMENT 8
#define TYPE_RESERVED (UINT32_C(1) << 31)

/* Return whether there is room for one more post in the ring, and in the promise. The caller holds the lock. */
static bool promised(const struct gateway_post *post)
{
    uint64_t promise = atomic_load_explicit(&gateway.posts->promise, memory_order_acquire);
    uint64_t used = gateway.post_head - atomic_load_explicit(&gateway.posts->tail, memory_order_acquire);
    uint32_t owner = (uint32_t)promise, left = (uint32_t)(promise >> 32) - (uint32_t)gateway.post_head;

    if (!owner || owner != atomic_load(&gateway.control->owner) ||
        atomic_load(&gateway.control->emulator) != EMULATOR_ACTIVE || used >= GATEWAY_POSTS) {
        return false;
    }
    return post->kind != KIND_VMCALL || (left != 0 && left <= GATEWAY_POSTS);
}

/* Return whether it was posted: then the trap has its answer. */
static bool post(struct vcpu_state *vcpu, const struct gateway_post *post)
{
    pthread_mutex_lock(&gateway.post_lock);
    bool posted = promised(post);
    if (posted) {
        gateway.posts->entries[gateway.post_head % GATEWAY_POSTS] = *post;
        gateway.post_head++;
        atomic_store_explicit(&gateway.posts->head, gateway.post_head, memory_order_release);
    }
    pthread_mutex_unlock(&gateway.post_lock);
    if (posted) {
        vcpu->shared->posts++;
        emulator_wake();
    } else {
        vcpu->shared->posts_held++;
    }
    return posted;
}

/* Post HvPostMessage with the input at a guest physical address, if it is certain to succeed. */
bool posts_message(struct vcpu_state *vcpu, uint64_t control, uint64_t address)
{
    struct gateway_post_rule rule;
    struct message_input input;
    uint32_t number;

    if (!tables_post(&rule) || !rule.messages || control != rule.control || address % INPUT_ALIGNMENT ||
        (address & PAGE_MASK) > PAGE_MASK + 1 - sizeof(input) || !tables_ram(address, sizeof(input))) {
        return false;
    }
    g_byte_array_set_size(vcpu->buffer, sizeof(input));
    if (qemu_plugin_read_memory_hwaddr(address, vcpu->buffer, sizeof(input)) != QEMU_PLUGIN_HWADDR_OPERATION_OK) {
        return false;
    }
    memcpy(&input, vcpu->buffer->data, sizeof(input));
    memcpy(&number, input.payload, sizeof(number));
    if (input.connection >= 32 || !(rule.connections >> input.connection & 1) || !input.type ||
        input.type & TYPE_RESERVED || input.size < sizeof(number) || input.size > sizeof(input.payload) ||
        number >= 64 || !(rule.messages >> number & 1)) {
        return false;
    }
    struct gateway_post made = {
        .kind = KIND_VMCALL,
        .vcpu = (uint32_t)(vcpu - gateway.vcpus),
        .connection = input.connection,
        .size = input.size,
    };
    memcpy(made.payload, input.payload, input.size);
    return post(vcpu, &made);
}

/* Post a WRMSR whose value does not matter. */
bool posts_msr(struct vcpu_state *vcpu, uint32_t msr)
{
    struct gateway_post_rule rule;

    if (!tables_post(&rule) || !rule.msr || msr != rule.msr) {
        return false;
    }
    struct gateway_post made = { .kind = KIND_WRMSR, .vcpu = (uint32_t)(vcpu - gateway.vcpus) };
    return post(vcpu, &made);
}

/* Another emulator attaches. When this returns, no vCPU is about to post what the one before has promised. */
void posts_new_owner(void)
{
    pthread_mutex_lock(&gateway.post_lock);
    atomic_store(&gateway.posts->promise, 0);
    atomic_store(&gateway.posts->first, gateway.post_head);
    atomic_fetch_add(&gateway.control->owner, 1);
    pthread_mutex_unlock(&gateway.post_lock);
}

/* The emulator is gone: nobody keeps its promise. */
void posts_withdraw(void)
{
    pthread_mutex_lock(&gateway.post_lock);
    atomic_store(&gateway.posts->promise, 0);
    pthread_mutex_unlock(&gateway.post_lock);
}
