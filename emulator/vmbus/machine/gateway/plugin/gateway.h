/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Private declarations of the trap gateway; gateway.c has the overview. */
#ifndef VMBUS_GATEWAY_H
#define VMBUS_GATEWAY_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "plugin_api.h"
#include "shared.h"

enum gateway_register {
    GUEST_RAX, GUEST_RBX, GUEST_RCX, GUEST_RDX, GUEST_RSI, GUEST_RDI, GUEST_R8, GUEST_R15, GUEST_RSP,
    GUEST_RIP, GUEST_CS, GUEST_EFLAGS, GUEST_CR0, GUEST_COUNT
};

/* Identifies a trap of a vCPU. Compared with memcmp, so it must have no padding. */
struct trap_key {
    uint64_t kind;
    uint64_t pc;
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, r8, rsp;
};

struct slot_state {
    bool busy; /* requested, and the answer is not fetched yet */
    uint64_t sequence;     /* of the last request in this slot */
    uint64_t sequence_age; /* `asked` when that request was made */
    struct trap_key key;
};

/* The timer of the local APIC, as the guest has set it through MSRs; times of CLOCK_MONOTONIC. */
struct apic_timer {
    uint32_t lvt;
    uint32_t count;
    unsigned int shift; /* log2 of the divider */
    uint64_t due_ns;    /* 0: stopped, or not known */
    uint64_t period_ns; /* 0: one shot */
};

/* How long a vCPU polls before HLT (idle.c). */
struct idle_policy {
    bool halted;   /* since the last interrupt */
    bool in_vain;  /* it polled before this halt, and found nothing */
    uint64_t begun_ns; /* of this halt */
    uint64_t window_ns;
    uint64_t missed_seen, passed_seen;
    uint64_t quiet_until_ns, back_off_ns;
    unsigned int successes; /* since the last gap */
};

/* State of a vCPU; only the vCPU's own thread accesses it, but for `ipis`. */
struct vcpu_state {
    bool ready;
    struct qemu_plugin_register *registers[GUEST_COUNT];
    GByteArray *buffer;
    struct gateway_vcpu *shared;
    _Atomic uint64_t *requests; /* GATEWAY_SLOTS sequence numbers */
    struct slot_state slots[GATEWAY_SLOTS];
    uint64_t asked; /* number of requests so far */
    bool fault_pending; /* RCX was changed to make RDMSR or WRMSR fault */
    uint64_t fault_pc;
    uint64_t fault_rcx;
    uint32_t arm_seen;
    struct apic_timer timer;
    struct idle_policy idle;
    _Atomic uint64_t ipis; /* interrupts from other vCPUs; they count them before they send them */
    uint64_t ipis_seen;
    uint64_t tsc_before; /* host TSC before an RDTSC whose next instruction has not started yet; 0: none */
};

struct gateway {
    struct gateway_control *control;
    uint8_t *region;
    uint8_t *doorbells;
    struct gateway_posts *posts;
    uint8_t *code;
    uint64_t code_pages;
    uint64_t region_size;
    int memory_fd;
    int event_fd;  /* wakes the emulator */
    int engine_fd; /* wakes its engine; -1: there was none so far */
    bool wait;
    bool one_thread; /* QEMU runs all vCPUs in one thread: one that polls keeps the others from running */
    unsigned int vcpus_max;
    struct vcpu_state *vcpus;
    const char *socket_path;
    int listen_fd;
    pthread_t listener;
    /* Protects changes of control->emulator, and withdrawing a request while no emulator is attached. */
    pthread_mutex_t lock;
    uint64_t gone_since_ns; /* when the last emulator detached; protected by `lock` */
    qemu_plugin_u64 sampling;
    uint64_t first_tsc;
    uint64_t first_ns;
    pthread_mutex_t clock_lock;
    pthread_mutex_t post_lock; /* protects what the gateway writes of the ring of posts, and the next */
    uint64_t post_head;
};

extern struct gateway gateway;

/*
 * Facts about an instruction at translation, packed into the user data of its callback. QEMU looks up blocks by the
 * base and size of the code segment and by the privilege level, so these are the same at each execution; the page
 * offset is, too.
 *
 * The program counter is not: blocks are shared between virtual addresses. The program counter that a callback can
 * read is that of the start of the block, or of an earlier instruction of the block. A block lies in one page, except
 * for the end of its last instruction, so the low bits give the distance from there to the instruction.
 */
struct insn_info {
    unsigned int kind;   /* enum gateway_kind */
    bool long_mode;      /* 64-bit code */
    bool privileged;     /* privilege level 0 */
    unsigned int offset; /* low 12 bits of the program counter (not of the linear address) */
    unsigned int size;
};

static inline void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

#define PAGE_SHIFT 12
#define PAGE_MASK UINT64_C(0xfff)

/* translation.c */
bool translation_thread(struct vcpu_state *vcpu);
struct insn_info insn_unpack(const void *userdata);
void on_translation(struct qemu_plugin_tb *tb, void *userdata);

/* traps.c */
void on_trap(unsigned int index, void *userdata);

/* resets.c */
void resets_translation(struct vcpu_state *vcpu, struct qemu_plugin_tb *tb, uint64_t start);
void on_reset(unsigned int index, void *userdata);

/* interrupts.c */
void on_discontinuity(unsigned int index, enum qemu_plugin_discon_type type, uint64_t from_pc, uint64_t to_pc,
                      void *userdata);

/* idle.c */
void on_halt(unsigned int index, void *userdata);
void idle_ended(struct vcpu_state *vcpu);
void idle_start(struct vcpu_state *vcpu);

/* apic.c */
bool apic_read(struct vcpu_state *vcpu, uint64_t address, uint32_t *value);
bool apic_reachable(const struct vcpu_state *vcpu);
bool apic_raise(struct vcpu_state *vcpu, uint32_t vector);
bool apic_requests(struct vcpu_state *vcpu);
void apic_wrmsr(struct vcpu_state *vcpu, uint32_t msr, uint64_t value);
uint64_t apic_timer_due(struct vcpu_state *vcpu, uint64_t now);
void apic_timer_fired(struct vcpu_state *vcpu, uint64_t now);

/* journal.c */
int journal_memory(void);

/* memory.c */
bool memory_create(unsigned int vcpus_max, uint64_t code_pages);

/* registers.c */
bool registers_find(struct vcpu_state *vcpu);
uint64_t register_read(struct vcpu_state *vcpu, enum gateway_register which);
void register_write(struct vcpu_state *vcpu, enum gateway_register which, uint64_t value);
bool registers_long_mode(struct vcpu_state *vcpu);
bool registers_real_mode(struct vcpu_state *vcpu);
bool registers_privileged(struct vcpu_state *vcpu);

/* tables.c: copy entries of the emulator's tables; false while the emulator writes them */
bool tables_cpuid(uint32_t leaf, struct gateway_cpuid *found);
bool tables_doorbell(uint64_t control, uint64_t input, uint32_t *doorbell, uint64_t *result);
bool tables_gone(uint32_t code, uint32_t *status);
bool tables_msr(uint32_t msr, unsigned int vcpu, uint64_t *value);
bool tables_post(struct gateway_post_rule *rule);
bool tables_ram(uint64_t address, uint64_t size);

/* posts.c */
bool posts_message(struct vcpu_state *vcpu, uint64_t control, uint64_t address);
bool posts_msr(struct vcpu_state *vcpu, uint32_t msr);
void posts_new_owner(void);
void posts_withdraw(void);

/* slots.c */
enum slot_outcome { OUTCOME_VALUE, OUTCOME_FAULT, OUTCOME_RETRY };
enum slot_outcome slots_ask(struct vcpu_state *vcpu, const struct trap_key *key, bool long_mode,
                            uint64_t *value);
bool slots_in_use(const struct vcpu_state *vcpu);
bool slots_repeated(struct vcpu_state *vcpu, const struct trap_key *key);
void emulator_wake(void);
void engine_wake(void);
void emulator_rest(void);

/* clock.c */
uint64_t clock_tsc(void);
uint64_t clock_ns(void);
void clock_start(void);
void clock_refresh(bool now);
void clock_arm(unsigned int index, struct vcpu_state *vcpu);
void clock_note_rdtsc(uint64_t next);
bool clock_follows_rdtsc(uint64_t start);
void clock_before_rdtsc(unsigned int index, void *userdata);
void clock_after_rdtsc(unsigned int index, void *userdata);

/* listener.c */
bool listener_start(void);
void listener_unlink(void);

#endif
