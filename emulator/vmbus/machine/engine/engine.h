/* SPDX-License-Identifier: MIT */
/*
 * The engine: one thread that moves packets of fast channels between a guest's rings and back ends.
 *
 *      ring --take()--> device: take --transfer--> io_uring --> device: complete --> answer --deliver()--> ring
 *                          |              |                        |  |
 *                          |              +------> queue ----------+  |
 *                          +--not plain: LEFT --> Python <--failed, or code was stored over--+
 *
 * docs/decisions/0006-native-data-path.md is the design. What is here: GIVE and RECALL, the rings, the policy,
 * signals, and the mirror of requests for a successor. A channel with a packet that the device leaves to Python is
 * LEFT: the engine does not touch its rings any more, Python recalls it, handles the packet, and gives the channel
 * again.
 *
 * The thread owns everything in `struct engine` that is not said to be somebody else's. Guest memory is read once,
 * into private memory, and checked there. The mirror is written, and never read: another process maps it.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "engine_device.h"
#include "layout.h"
#include "signals.h"

#define PAGE ((uint64_t)1 << PAGE_SHIFT)
#define EXPORT __attribute__((visibility("default")))
/* User data of entries of the io_uring that belong to no request. */
#define WAKE UINT64_MAX
#define QUEUE_POLL ((uint64_t)1 << 32)   /* and the index of the queue, as in the next two */
#define QUEUE_KICK ((uint64_t)2 << 32)
#define QUEUE_CANCEL ((uint64_t)3 << 32)

extern const struct engine_services engine_services;

enum request_state { FREE, TAKEN, UNDER_WAY, DONE, PYTHON };

/* A request of a guest, from its packet to its answer. */
struct request {
    uint32_t state;
    uint32_t channel, opening;
    uint32_t taken_number;
    struct engine_device device;
    uint32_t size, answer_size;
    int32_t result;
    uint32_t next; /* in a list: free slots, or answers of a channel */
    uint32_t noted;
    uint32_t all_noted; /* every range that is stored into, because they are to be reported */
    uint32_t queue;     /* 1 + the index of the queue that it is in; 0: in none */
    uint32_t length;    /* bytes of data in the queue */
    uint32_t room;      /* bytes that the server may write */
    uint32_t older, newer; /* its neighbours there; MAX_SLOTS: none */
    uint64_t begun_ns;
    uint8_t answer[MAX_ANSWER];
    uint8_t packet[MAX_PACKET];
    struct range range[MAX_NOTED]; /* stored into, and code was translated from there */
};

struct ring {
    const uint64_t *page; /* offsets in the file of guest RAM; the control page first */
    uint32_t size;        /* bytes of data */
    uint32_t index;       /* the host's own: read index of the incoming ring, write index of the outgoing one */
};

struct channel {
    uint32_t owner; /* enum OWNER_* */
    uint32_t opening;
    struct ring in, out;
    struct engine_device device;
    uint8_t *doorbell; /* in the memory shared with the gateway */
    uint32_t *flag;
    uint64_t flag_page;
    uint32_t flag_bit, vector;
    struct vcpu_signals vcpu;
    char line[LINE_SIZE]; /* for QEMU, which raises the interrupt */
    uint32_t line_length;
    uint32_t masked;
    uint32_t gives;               /* as in struct channel_setup */
    uint32_t room_asked, blocked; /* the pending send size is set; nothing fits until the guest rings */
    uint32_t outstanding; /* slots of this opening; Python reads it, too */
    uint32_t in_flight, taken_number, done_number, answered_number;
    uint32_t first_done, last_done, done; /* answers that the guest does not have yet, in order */
    uint64_t held_since, idle_since, waits_since;
    uint32_t line_owed;
    struct channel_counts counts;
};

struct uring {
    int fd;
    void *sq_map, *cq_map, *sqe_map;
    uint64_t sq_size, cq_size, sqe_size;
    uint32_t *sq_tail, *sq_flags, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask, sq_entries, tail, unsubmitted;
    void *cqes;
};

/* A virtqueue to the process that serves a disk; a slot is its entry with the same number (queues.c). */
struct queue {
    uint32_t number; /* 0: free */
    uint32_t open;   /* requests are taken, and the used ring is looked at */
    uint8_t *memory; /* shared with the server; of it only the used ring and the statuses are read */
    int kick_fd, call_fd;
    uint16_t available, used;
    uint32_t oldest, newest;      /* slots of requests without an answer; MAX_SLOTS: none */
    uint32_t unkicked;            /* requests of which the server was not told */
    uint32_t kicking, kick_again; /* an entry of the io_uring writes to kick_fd */
    uint32_t armed, cancelled;    /* another one polls call_fd */
    _Atomic uint32_t in_flight, trouble;
    _Atomic uint64_t answered;
    _Atomic uint64_t oldest_ns, overtaken_ns; /* as in struct queue_state */
};

struct command {
    uint32_t kind;
    struct queue_setup *queue;   /* OPEN_QUEUE */
    struct mirror *mirror;       /* MIRROR; NULL afterwards if it is too late */
    uint32_t begins;             /* it is empty; else it is as this engine has left it */
    uint32_t queue_number;       /* CLOSE_QUEUE */
    struct channel_setup *setup; /* GIVE */
    uint32_t channel;
    struct recalled recalled;    /* RECALL */
    struct engine_counts counts; /* COUNTS */
    struct channel_counts channel_counts;
};

struct engine {
    struct engine_setup setup;
    struct engine_counts counts;
    /* of the thread and its callers, under `lock` */
    pthread_mutex_t asking; /* held from a command to its end */
    pthread_mutex_t lock;
    pthread_cond_t done;
    struct command *command;
    /* single producer, single consumer */
    _Atomic uint32_t event_head, event_tail, release_head, release_tail;
    struct event event[MAX_EVENTS];
    uint32_t release[MAX_EVENTS];
    _Atomic uint32_t wanted; /* a command waits, or the thread is to end */
    _Atomic uint32_t stop;
    _Atomic uint32_t asleep; /* as the word that is shared with the gateway, which others may change */
    _Atomic uint32_t in_flight;
    _Atomic uint64_t lines; /* sent to QEMU */
    _Atomic uint64_t lines_limit; /* no more may be sent until Python has read answers */
    _Atomic uint32_t lines_told; /* an event says so, and Python has not read it yet */
    pthread_mutex_t line_lock;   /* held by whoever writes to QEMU's socket */
    /* the thread's */
    pthread_t thread;
    struct uring uring;
    int wake_fd, event_fd;
    uint32_t armed, rang;
    uint32_t channels; /* the highest number given, plus one */
    uint32_t first_free, ended_count;
    uint32_t ended[MAX_SLOTS]; /* slots whose request ended without a transfer */
    uint32_t unkicked;          /* requests in queues of which the servers were not told */
    uint32_t queues, opened;    /* the highest index in use plus one; queues opened so far */
    uint64_t last_ns, unsubmitted_ns, quiet_until_ns, back_off_ns;
    struct queue queue[MAX_QUEUES];
    struct channel channel[MAX_CHANNELS];
    struct request request[MAX_SLOTS];
    uint64_t pages[MAX_CHANNELS][MAX_RING_PAGES];
};

/* Between two stores of which a crash may see only the first: a test ends the process here. */
#ifdef ENGINE_STEPS
void engine_step(void);
#define STEP() engine_step()
#else
#define STEP() ((void)0)
#endif

static inline void full_fence(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

uint64_t now_ns(void);
void engine_ask(struct engine *engine, struct command *command);

/* rings.c */
uint32_t rings_take(struct engine *engine, uint32_t number);
void rings_deliver(struct engine *engine, struct channel *channel, uint64_t now);
void rings_mask(struct engine *engine, struct channel *channel, uint32_t masked);
void channel_leave(struct engine *engine, uint32_t number);
void signal_guest(struct engine *engine, struct channel *channel, int may_wait);
void signal_look(struct engine *engine, struct channel *channel, uint64_t now);
void signal_settle(struct engine *engine, struct channel *channel);

/* requests.c */
uint32_t request_new(struct engine *engine);
void request_free(struct engine *engine, uint32_t slot);
void request_mirror(struct engine *engine, uint32_t slot);
void channel_mirror(struct engine *engine, uint32_t number);
void mirror_begin(struct mirror *mirror);
uint32_t requests_collect(struct engine *engine, uint64_t now);
void request_answer(struct engine *engine, uint32_t slot, uint64_t now);
void request_completed(struct engine *engine, uint32_t slot, int32_t result, uint64_t now);
void event_put(struct engine *engine, uint32_t kind, uint32_t index);

/* queues.c */
uint32_t queue_transfer(struct engine *engine, uint32_t slot, uint32_t number, const struct iovec *iov, uint32_t count,
                        uint64_t offset, int is_write);
uint32_t queue_open(struct engine *engine, const struct queue_setup *setup);
void queue_close(struct engine *engine, uint32_t number, uint64_t now);
void queues_kick(struct engine *engine);
uint32_t queues_collect(struct engine *engine, uint64_t now);
int queues_listen(struct engine *engine);
void queues_ignore(struct engine *engine);
void queues_free(struct engine *engine);
void queues_event(struct engine *engine, uint64_t what, int32_t result, uint32_t flags);

/* uring.c */
int uring_open(struct uring *ring, uint32_t entries);
void uring_close(struct uring *ring);
void *uring_entry(struct uring *ring);
int uring_ready(const struct uring *ring);
void uring_collect(const struct uring *ring);
int uring_submit(struct uring *ring, uint32_t wait);

#endif
