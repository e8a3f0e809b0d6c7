/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The memory that the gateway and the emulator share, and the messages on the socket.
 *
 * emulator/vmbus/wire/gateway.py declares the same layout; a unit test compares the two. Every word has one writer,
 * named beside it: the gateway (G) or the emulator (E). Sequence numbers begin at 0. docs/gateway.md describes the
 * order of stores and loads.
 */
#ifndef VMBUS_SHARED_H
#define VMBUS_SHARED_H

#include <stdatomic.h>
#include <stdint.h>

#define GATEWAY_MAGIC UINT64_C(0x3157477375424d56) /* "VMBusGW1" */
#define GATEWAY_VERSION 3
#define GATEWAY_SLOTS 8
#define GATEWAY_DOORBELLS 8192
#define GATEWAY_CPUID_LEAVES 32
#define GATEWAY_RULES 32
#define GATEWAY_GONE 16
#define GATEWAY_MSRS 16
#define GATEWAY_VECTORS 256
#define GATEWAY_POSTS 64
#define GATEWAY_POST_RULES 1
#define GATEWAY_POST_PAYLOAD 240
#define GATEWAY_RAM 8
#define GATEWAY_JOURNAL_SIZE UINT64_C(0x2000000)

enum gateway_kind { KIND_CPUID = 1, KIND_RDMSR = 2, KIND_WRMSR = 3, KIND_VMCALL = 4 };

enum gateway_verdict {
    VERDICT_OK = 0,    /* the value is the result */
    VERDICT_FAULT = 1, /* #GP for an MSR, #UD for VMCALL */
    VERDICT_AGAIN = 2, /* the request was dropped; if the instruction is executed again, it makes a new one */
};

enum gateway_emulator { EMULATOR_NONE = 0, EMULATOR_ATTACHED = 1, EMULATOR_ACTIVE = 2 };

/* The gateway only stores this word, for the next emulator. */
enum gateway_guest { GUEST_FREE = 0, GUEST_ENGAGED = 1, GUEST_LEFT = 2 };

/* What a vCPU does about interrupts that wait in `pending`; docs/gateway.md#interrupts-before-hlt. */
enum gateway_idle {
    IDLE_RUNNING = 0, /* it looks at them before its next HLT */
    IDLE_POLLING = 1, /* it raises them within nanoseconds, and in any case before it halts */
    IDLE_HALTED = 2,  /* it does not look: only QEMU can wake it */
};

#define SLOT_LONG_MODE 1u

/* A trap that waits for an answer. G; does not change after its sequence number was stored. */
struct gateway_slot {
    uint32_t kind;
    uint32_t flags;
    uint64_t tsc; /* host TSC when the request was made; 0 if the host has no TSC */
    uint64_t pc;
    uint64_t rax;
    uint64_t rbx;
    uint64_t rcx;
    uint64_t rdx;
    uint64_t rsi;
    uint64_t rdi;
    uint64_t r8;
    uint64_t rsp;
    uint64_t reserved[5];
};

/* E; `sequence` is stored last. */
struct gateway_answer {
    _Atomic uint64_t sequence;
    uint64_t value;
    uint32_t verdict;
    uint32_t reserved0;
    uint64_t reserved1;
};

struct gateway_vcpu {
    uint32_t present;          /* G: the vCPU exists */
    _Atomic uint32_t sleeping; /* G: 1 while the vCPU sleeps on the sequence number of an answer */
    uint64_t requests;         /* G: first of the counters */
    uint64_t retries;
    uint64_t doorbells;
    uint64_t gone_results;
    uint64_t faults;
    uint64_t auto_eois;
    uint64_t no_slot;
    uint64_t auto_eoi_failures; /* interrupts for which the local APIC's registers could not be read */
    uint64_t halts;             /* HLT instructions */
    uint64_t polls;             /* of these, the ones before which the vCPU polled */
    uint64_t polled_ns;
    uint64_t raised;         /* interrupts that it raised by itself */
    uint64_t posts;          /* traps that it posted */
    uint64_t posts_held;     /* traps that became requests, because the ring or the promise had no room; last of the
                                counters */
    _Atomic uint32_t idle;   /* enum gateway_idle */
    uint32_t poll_window_ns; /* how long it polls at present */
    _Atomic uint64_t retired[GATEWAY_SLOTS];  /* G: sequence number of the last finished request */
    _Atomic uint64_t auto_eoi[GATEWAY_VECTORS / 64]; /* E: bitmap of vectors that the gateway ends */
    _Atomic uint64_t pending[GATEWAY_VECTORS / 64];  /* E sets, G and E take, atomically: vectors to raise */
    uint64_t msi_address;                     /* E: where a write of a vector interrupts this vCPU; 0: unknown */
    _Atomic uint64_t missed;                  /* E: signals that found the vCPU halted: their interrupts */
    _Atomic uint64_t passed;                  /* E: or running: come through QEMU; counted before they are sent */
    uint64_t reserved1[5];
    struct gateway_answer answers[GATEWAY_SLOTS];
    struct gateway_slot slots[GATEWAY_SLOTS];
};

struct gateway_cpuid {
    uint32_t leaf;
    uint32_t eax;
    uint32_t ebx;
    uint32_t ecx;
    uint32_t edx;
    uint32_t reserved;
};

/* A doorbell: bit 0 is set by the gateway, the others by the emulator; both with locked instructions. */
#define DOORBELL_RUNG 1u
#define DOORBELL_ENGINE 2u /* a thread of its own serves it, which has an eventfd of its own */

/* VMCALL with this control word and base <= first input < base + count: doorbell `first` + input - base. */
struct gateway_rule {
    uint64_t control;
    uint64_t base;
    uint64_t result;
    uint32_t count;
    uint32_t first;
};

/* Result of VMCALLs with this call code if no emulator was attached for longer than hold_timeout_ms. */
struct gateway_gone {
    uint32_t code;
    uint32_t status;
};

/* RDMSR of `msr`: `value`, plus the index of the vCPU if MSR_ADD_VCPU is set. */
struct gateway_msr {
    uint32_t msr;
    uint32_t flags;
    uint64_t value;
};

#define MSR_ADD_VCPU 1u

/*
 * What may be posted: WRMSR of `msr`, and HvPostMessage, whose control word is `control`, to a connection and with a
 * first payload word that are in the bitmaps.
 */
struct gateway_post_rule {
    uint64_t control;
    uint64_t messages;
    uint32_t connections;
    uint32_t msr; /* 0: none */
};

/* Guest RAM: the input of a hypercall that is posted lies in it. */
struct gateway_ram {
    uint64_t start;
    uint64_t size;
};

/* A trap that was answered when it was posted. */
struct gateway_post {
    uint32_t kind; /* KIND_WRMSR, KIND_VMCALL */
    uint32_t vcpu;
    uint32_t connection;
    uint32_t size;
    uint8_t payload[GATEWAY_POST_PAYLOAD];
};

/* `head` and `tail` count posts. */
struct gateway_posts {
    _Atomic uint64_t head;  /* G; stored after the entry */
    _Atomic uint64_t first; /* G: `head` when the present emulator attached */
    uint64_t reserved0[6];
    _Atomic uint64_t tail; /* E; stored after the entries were copied */
    /*
     * E. Low half: the `owner` that promises, 0: nobody; high half: the count of posts, modulo 2^32, from which on no
     * message is promised.
     */
    _Atomic uint64_t promise;
    uint64_t reserved1[6];
    struct gateway_post entries[GATEWAY_POSTS];
};

struct gateway_control {
    /* G, constant */
    uint64_t magic;
    uint32_t version;
    uint32_t vcpus_max;
    uint64_t region_size;
    uint64_t vcpu_offset;
    uint64_t request_offset; /* one cache line of GATEWAY_SLOTS sequence numbers (G) a vCPU */
    uint64_t doorbell_offset;
    uint64_t code_offset;
    uint64_t code_pages;
    /* G: vCPUs and the attached emulator */
    _Atomic uint32_t vcpus; /* highest index seen, plus one */
    _Atomic uint32_t emulator;
    _Atomic uint32_t owner; /* incremented at every attach */
    _Atomic uint32_t was_active;
    _Atomic uint32_t raise_failures; /* interrupts that a vCPU could not raise: they are pending again */
    _Atomic uint32_t resets;         /* how often the reset vector was executed, modulo 2^32 */
    uint64_t post_offset;            /* constant */
    uint64_t journal_size;           /* constant; 0: this gateway does not know JOURNAL, nor does it count resets */
    uint64_t reserved0[3];
    /* G, under clock_sequence */
    _Atomic uint32_t clock_sequence;
    uint32_t tsc_known; /* 1: the host has a TSC; 0: the fields below are 0, too */
    uint32_t arm_seen;  /* the `arm` that the samples belong to */
    uint32_t samples;
    uint64_t tsc_offset; /* host TSC - guest TSC, modulo 2^64: middle of the intersected bounds */
    uint64_t pair_tsc;   /* host TSC and CLOCK_MONOTONIC at the same moment */
    uint64_t pair_ns;
    uint64_t tsc_frequency; /* Hz; 0 until measured */
    uint64_t reserved1[2];
    /* E */
    _Atomic uint32_t waiting; /* 1: write the eventfd when there is work */
    _Atomic uint32_t engine_waiting; /* 1: write the second eventfd when a doorbell of the engine is rung */
    uint32_t reserved2[14];
    _Atomic uint32_t arm;           /* a change requests new TSC samples */
    _Atomic uint32_t hold_timeout_ms; /* 0: requests wait without limit */
    _Atomic uint32_t spin_ns;       /* how long a vCPU spins for an answer before it sleeps */
    uint32_t guest;                 /* enum gateway_guest */
    _Atomic uint32_t poll_ns;       /* how long a vCPU polls before HLT at most; 0: not at all */
    uint32_t reserved3[11];
    /* E, under table_sequence (odd: being written) */
    _Atomic uint32_t table_sequence;
    uint32_t cpuid_count;
    uint32_t rule_count;
    uint32_t gone_count;
    uint32_t msr_count;
    uint32_t post_count;
    uint32_t ram_count;
    uint32_t reserved4[9];
    struct gateway_cpuid cpuid[GATEWAY_CPUID_LEAVES];
    struct gateway_rule rules[GATEWAY_RULES];
    struct gateway_gone gone[GATEWAY_GONE];
    struct gateway_msr msrs[GATEWAY_MSRS];
    struct gateway_post_rule posts[GATEWAY_POST_RULES];
    struct gateway_ram ram[GATEWAY_RAM];
};

/* Socket messages. */
#define GATEWAY_MESSAGE_MAGIC UINT32_C(0x57476256) /* "VbGW" */

enum gateway_message_type {
    MESSAGE_HELLO = 1,
    MESSAGE_ACTIVATE = 2,
    MESSAGE_CLOCK = 3,
    MESSAGE_ENGINE = 4,
    MESSAGE_JOURNAL = 5,
};

enum gateway_status { STATUS_OK = 0, STATUS_VERSION = 1, STATUS_BUSY = 2, STATUS_REFUSED = 3, STATUS_UNKNOWN = 4 };

#define HELLO_TAKEOVER 1u

struct gateway_message {
    uint32_t magic;
    uint32_t type;
    uint32_t version; /* HELLO */
    uint32_t flags;   /* HELLO */
};

/*
 * The reply to a successful HELLO carries two descriptors: the memory and an eventfd; that to ENGINE a second eventfd,
 * for the doorbells of the emulator's engine; that to JOURNAL the journal's memory, the same at every request.
 */
struct gateway_reply {
    uint32_t magic;
    uint32_t type;
    uint32_t status;
    uint32_t version;
    /* HELLO: size of the region, or process id of the attached emulator. JOURNAL: its size, or why there is none (errno) */
    uint64_t argument;
};

#endif
