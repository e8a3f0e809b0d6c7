/* SPDX-License-Identifier: MIT */
/*
 * Queues: split virtqueues to processes that serve disks (vhost-user-blk), beside the io_uring.
 *
 *      queue_transfer(): table of a slot, available ring --queues_kick()--> server
 *      queues_collect(): used ring --checks--> request_completed()
 *
 * Data moves between the server and guest RAM, of which the server has the file: the descriptors point there. The
 * slot of a request is also its entry, so there is always room. The server has read an image, and is not trusted:
 * nothing that it can write is believed but the used ring and the statuses, each number of them once and after a
 * check. Where it breaks a rule the queue is not looked at any more, and Python ends the server; only then are its
 * requests given to Python, so that none is done twice at the same time. Its eventfds are written and waited for by
 * the io_uring alone: whoever shares an eventfd can make its readers and writers block.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct used {
    uint32_t number, length;
};

struct block_header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct block_request {
    struct block_header header;
    uint8_t status;
};

_Static_assert(sizeof(struct descriptor) == VIRTQUEUE_DESCRIPTOR_SIZE, "descriptor");
_Static_assert(sizeof(struct used) == VIRTQUEUE_USED_SIZE, "used");
_Static_assert(sizeof(struct block_header) == BLOCK_HEADER_SIZE, "header");
_Static_assert(sizeof(struct block_request) <= QUEUE_REQUEST_SIZE, "request");
_Static_assert(MAX_SLOTS <= 32768 && !(MAX_SLOTS & (MAX_SLOTS - 1)), "the size of a virtqueue");

static const uint64_t one = 1;

static struct queue *find(struct engine *engine, uint32_t number)
{
    struct queue *queue = &engine->queue[number % MAX_QUEUES];

    return number && queue->number == number ? queue : NULL;
}

static uint16_t *available(const struct queue *queue)
{
    return (uint16_t *)(queue->memory + QUEUE_AVAILABLE); /* flags, index, numbers */
}

static uint16_t *used_head(const struct queue *queue)
{
    return (uint16_t *)(queue->memory + QUEUE_USED); /* flags, index */
}

static int has_answers(const struct queue *queue)
{
    return __atomic_load_n(&used_head(queue)[1], __ATOMIC_ACQUIRE) != queue->used;
}

static void set_oldest(const struct engine *engine, struct queue *queue, uint32_t slot)
{
    queue->oldest = slot;
    atomic_store_explicit(&queue->oldest_ns, slot < MAX_SLOTS ? engine->request[slot].begun_ns : 0,
                          memory_order_relaxed);
    atomic_store_explicit(&queue->overtaken_ns, 0, memory_order_relaxed);
}

static void add(struct engine *engine, struct queue *queue, uint32_t slot)
{
    struct request *request = &engine->request[slot];

    request->queue = (uint32_t)(queue - engine->queue) + 1;
    request->older = queue->newest;
    request->newer = MAX_SLOTS;
    if (request->older < MAX_SLOTS)
        engine->request[request->older].newer = slot;
    else
        set_oldest(engine, queue, slot);
    queue->newest = slot;
    atomic_fetch_add_explicit(&queue->in_flight, 1, memory_order_relaxed);
}

/* The request is answered, at `now`, or comes back. */
static void take_out(struct engine *engine, struct queue *queue, uint32_t slot, uint64_t now)
{
    struct request *request = &engine->request[slot];

    request->queue = 0;
    if (request->newer < MAX_SLOTS)
        engine->request[request->newer].older = request->older;
    else
        queue->newest = request->older;
    if (request->older >= MAX_SLOTS)
        set_oldest(engine, queue, request->newer);
    else {
        engine->request[request->older].newer = request->newer;
        if (!atomic_load_explicit(&queue->overtaken_ns, memory_order_relaxed))
            atomic_store_explicit(&queue->overtaken_ns, now, memory_order_relaxed);
    }
    atomic_fetch_sub_explicit(&queue->in_flight, 1, memory_order_relaxed);
}

/* Have the server do the transfer of a request. Return 0 if that is not possible now. */
uint32_t queue_transfer(struct engine *engine, uint32_t slot, uint32_t number, const struct iovec *iov, uint32_t count,
                        uint64_t offset, int is_write)
{
    struct queue *queue = find(engine, number);
    uint16_t data_flags = (uint16_t)(DESCRIPTOR_NEXT | (is_write ? 0 : DESCRIPTOR_WRITE)), n = 0;
    uint64_t length = 0;

    if (!queue || !queue->open || !count || count > MAX_QUEUE_PIECES || offset & (((uint64_t)1 << SECTOR_SHIFT) - 1))
        return 0;
    uint64_t place = QUEUE_REQUESTS + (uint64_t)slot * QUEUE_REQUEST_SIZE;
    uint64_t table_place = QUEUE_TABLES + (uint64_t)slot * QUEUE_TABLE_SIZE;
    struct block_request *request = (struct block_request *)(queue->memory + place);
    struct descriptor *table = (struct descriptor *)(queue->memory + table_place);
    *request = (struct block_request){
        .header = { .type = is_write ? BLOCK_WRITE : BLOCK_READ, .sector = offset >> SECTOR_SHIFT },
        .status = (uint8_t)~BLOCK_OK,
    };
    table[n] = (struct descriptor){ QUEUE_MEMORY + place, BLOCK_HEADER_SIZE, DESCRIPTOR_NEXT, 1 };
    for (n = 1; n <= count; n++) {
        const struct iovec *piece = &iov[n - 1];
        uint64_t at = (uint64_t)((uint8_t *)piece->iov_base - engine->setup.ram);
        table[n] = (struct descriptor){ QUEUE_RAM + at, (uint32_t)piece->iov_len, data_flags, (uint16_t)(n + 1) };
        length += piece->iov_len;
    }
    table[n++] = (struct descriptor){ QUEUE_MEMORY + place + offsetof(struct block_request, status), 1,
                                      DESCRIPTOR_WRITE, 0 };
    struct descriptor *entry = (struct descriptor *)queue->memory + slot;
    *entry = (struct descriptor){ QUEUE_MEMORY + table_place, n * (uint32_t)sizeof(*table), DESCRIPTOR_INDIRECT, 0 };
    engine->request[slot].length = (uint32_t)length;
    engine->request[slot].room = is_write ? 1 : (uint32_t)length + 1;
    uint16_t *ring = available(queue);
    ring[2 + queue->available % MAX_SLOTS] = (uint16_t)slot;
    __atomic_store_n(&ring[1], ++queue->available, __ATOMIC_RELEASE);
    add(engine, queue, slot);
    queue->unkicked++;
    engine->unkicked++;
    return 1;
}

static void *entry_for(struct engine *engine, const struct queue *queue, uint64_t kind)
{
    struct io_uring_sqe *entry = uring_entry(&engine->uring);

    if (entry)
        entry->user_data = kind | (uint64_t)(queue - engine->queue);
    return entry;
}

/* Tell the servers of new requests. */
void queues_kick(struct engine *engine)
{
    if (!engine->unkicked)
        return;
    full_fence();
    for (uint32_t i = 0; i < engine->queues; i++) {
        struct queue *queue = &engine->queue[i];
        if (!queue->unkicked)
            continue;
        if (queue->open && !(__atomic_load_n(&used_head(queue)[0], __ATOMIC_RELAXED) & RING_QUIET)) {
            if (queue->kicking) {
                queue->kick_again = 1;
            } else {
                struct io_uring_sqe *entry = entry_for(engine, queue, QUEUE_KICK);
                if (!entry)
                    continue; /* in the next pass */
                entry->opcode = IORING_OP_WRITE;
                entry->fd = queue->kick_fd;
                entry->addr = (uint64_t)(uintptr_t)&one;
                entry->len = sizeof(one);
                queue->kicking = 1;
            }
        }
        engine->unkicked -= queue->unkicked;
        queue->unkicked = 0;
    }
}

/* Wait for the server's eventfd from now on: every write to it is an event, and nobody has to read it. */
static void arm(struct engine *engine, struct queue *queue)
{
    struct io_uring_sqe *entry = queue->armed ? NULL : entry_for(engine, queue, QUEUE_POLL);

    if (!entry)
        return;
    entry->opcode = IORING_OP_POLL_ADD;
    entry->fd = queue->call_fd;
    entry->poll32_events = POLLIN;
    entry->len = IORING_POLL_ADD_MULTI;
    queue->armed = 1;
}

/* Use the queue no more: its server has broken a rule. */
static void give_up(struct engine *engine, struct queue *queue, uint32_t trouble)
{
    if (!queue->open)
        return;
    queue->open = 0;
    atomic_store(&queue->trouble, trouble);
    event_put(engine, EVENT_QUEUE, queue->number);
}

/* Complete what a server is done with; return how many requests that were. */
static uint32_t collect(struct engine *engine, struct queue *queue, uint64_t now)
{
    uint16_t index = __atomic_load_n(&used_head(queue)[1], __ATOMIC_ACQUIRE);
    uint32_t waiting = (uint16_t)(index - queue->used), count = 0;

    if (waiting > atomic_load_explicit(&queue->in_flight, memory_order_relaxed)) {
        give_up(engine, queue, QUEUE_TOO_MANY);
        return 0;
    }
    for (; queue->used != index; queue->used++, count++) {
        struct used *at = (struct used *)(queue->memory + QUEUE_USED + 4) + queue->used % MAX_SLOTS;
        uint32_t slot = __atomic_load_n(&at->number, __ATOMIC_RELAXED);
        uint32_t written = __atomic_load_n(&at->length, __ATOMIC_RELAXED);
        if (slot >= MAX_SLOTS || engine->request[slot].queue != queue - engine->queue + 1u ||
            engine->request[slot].state != UNDER_WAY) {
            give_up(engine, queue, QUEUE_UNKNOWN);
            break;
        }
        struct request *request = &engine->request[slot];
        if (written > request->room) {
            give_up(engine, queue, QUEUE_TOO_LONG);
            break;
        }
        const struct block_request *shared =
            (const struct block_request *)(queue->memory + QUEUE_REQUESTS + (uint64_t)slot * QUEUE_REQUEST_SIZE);
        uint8_t status = __atomic_load_n(&shared->status, __ATOMIC_RELAXED);
        int done = status == BLOCK_OK && (written == request->room || request->room == 1);
        take_out(engine, queue, slot, now);
        request_completed(engine, slot, done ? (int32_t)request->length : -EIO, now);
    }
    atomic_fetch_add_explicit(&queue->answered, count, memory_order_relaxed);
    return count;
}

uint32_t queues_collect(struct engine *engine, uint64_t now)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < engine->queues; i++) {
        struct queue *queue = &engine->queue[i];
        if (queue->open && has_answers(queue))
            count += collect(engine, queue, now);
    }
    return count;
}

static void free_if_unused(struct queue *queue)
{
    if (!queue->number || queue->memory || queue->armed || queue->kicking)
        return;
    close(queue->kick_fd);
    close(queue->call_fd);
    queue->number = 0;
}

/* End the poll of a queue that was closed. */
static void cancel(struct engine *engine, struct queue *queue)
{
    struct io_uring_sqe *entry = queue->armed && !queue->cancelled ? entry_for(engine, queue, QUEUE_CANCEL) : NULL;

    if (!entry)
        return;
    entry->opcode = IORING_OP_POLL_REMOVE;
    entry->addr = QUEUE_POLL | (uint64_t)(queue - engine->queue);
    queue->cancelled = 1;
}

/* Have the servers' eventfds end the sleep that follows; return whether there are answers already. */
int queues_listen(struct engine *engine)
{
    for (uint32_t i = 0; i < engine->queues; i++)
        if (engine->queue[i].open) {
            arm(engine, &engine->queue[i]);
            __atomic_store_n(&available(&engine->queue[i])[0], 0, __ATOMIC_RELAXED);
        } else if (!engine->queue[i].memory) {
            cancel(engine, &engine->queue[i]);
        }
    full_fence();
    for (uint32_t i = 0; i < engine->queues; i++)
        if (engine->queue[i].open && has_answers(&engine->queue[i]))
            return 1;
    return 0;
}

void queues_ignore(struct engine *engine)
{
    for (uint32_t i = 0; i < engine->queues; i++)
        if (engine->queue[i].open)
            __atomic_store_n(&available(&engine->queue[i])[0], RING_QUIET, __ATOMIC_RELAXED);
}

/* What the io_uring says about an eventfd of a queue. */
void queues_event(struct engine *engine, uint64_t what, int32_t result, uint32_t flags)
{
    uint32_t index = (uint32_t)what;

    if (index >= MAX_QUEUES)
        return;
    struct queue *queue = &engine->queue[index];
    if (what - index == QUEUE_POLL && !(flags & IORING_CQE_F_MORE)) {
        queue->armed = 0;
        if (result < 0 && queue->open)
            give_up(engine, queue, QUEUE_NO_POLL);
    } else if (what - index == QUEUE_KICK) {
        queue->kicking = 0;
        if (queue->kick_again) {
            queue->kick_again = 0;
            queue->unkicked++;
            engine->unkicked++;
        }
    }
    free_if_unused(queue);
}

uint32_t queue_open(struct engine *engine, const struct queue_setup *setup)
{
    uint32_t index = 0;

    while (index < MAX_QUEUES && engine->queue[index].number)
        index++;
    if (index == MAX_QUEUES)
        return 0;
    /* Descriptors of its own: entries of the io_uring may name them after Python has closed its own. */
    int kick_fd = fcntl(setup->kick_fd, F_DUPFD_CLOEXEC, 0), call_fd = fcntl(setup->call_fd, F_DUPFD_CLOEXEC, 0);
    if (kick_fd < 0 || call_fd < 0) {
        if (kick_fd >= 0)
            close(kick_fd);
        return 0;
    }
    struct queue *queue = &engine->queue[index];
    engine->opened = engine->opened < UINT32_MAX / MAX_QUEUES - 1 ? engine->opened + 1 : 1;
    memset(queue, 0, sizeof(*queue));
    queue->number = engine->opened * MAX_QUEUES + index;
    queue->memory = setup->memory;
    queue->oldest = queue->newest = MAX_SLOTS;
    queue->kick_fd = kick_fd;
    queue->call_fd = call_fd;
    __atomic_store_n(&available(queue)[0], RING_QUIET, __ATOMIC_RELAXED);
    queue->open = 1;
    if (engine->queues <= index)
        engine->queues = index + 1;
    return queue->number;
}

/* The server does nothing any more: what it has not done is Python's. */
void queue_close(struct engine *engine, uint32_t number, uint64_t now)
{
    struct queue *queue = find(engine, number);

    if (!queue || !queue->memory)
        return;
    if (queue->open)
        collect(engine, queue, now);
    queue->open = 0;
    engine->unkicked -= queue->unkicked;
    queue->unkicked = queue->kick_again = 0;
    while (queue->oldest < MAX_SLOTS) {
        uint32_t slot = queue->oldest;
        take_out(engine, queue, slot, now);
        request_completed(engine, slot, -EIO, now);
    }
    queue->memory = NULL;
    cancel(engine, queue);
    free_if_unused(queue);
}

/* The thread ends, and its io_uring has ended. */
void queues_free(struct engine *engine)
{
    for (uint32_t i = 0; i < engine->queues; i++) {
        engine->queue[i].memory = NULL;
        engine->queue[i].armed = engine->queue[i].kicking = 0;
        free_if_unused(&engine->queue[i]);
    }
}

/* ---- for Python ---- */

/* Use a queue whose server has accepted it, in any thread; return its number; 0: too many queues, or descriptors. */
EXPORT uint32_t engine_open_queue(struct engine *engine, struct queue_setup *setup)
{
    struct command command = { .kind = COMMAND_OPEN_QUEUE, .queue = setup };

    engine_ask(engine, &command);
    return setup->number;
}

/*
 * Forget a queue whose server has ended, in any thread. What is under way there has failed; when this returns, its
 * memory and descriptors are not used any more.
 */
EXPORT void engine_close_queue(struct engine *engine, uint32_t number)
{
    struct command command = { .kind = COMMAND_CLOSE_QUEUE, .queue_number = number };

    engine_ask(engine, &command);
}

/* In any thread. */
EXPORT void engine_queue_state(struct engine *engine, uint32_t number, struct queue_state *state)
{
    struct queue *queue = &engine->queue[number % MAX_QUEUES];

    *state = (struct queue_state){ .answered = atomic_load(&queue->answered),
                                   .oldest_ns = atomic_load(&queue->oldest_ns),
                                   .overtaken_ns = atomic_load(&queue->overtaken_ns),
                                   .under_way = atomic_load(&queue->in_flight),
                                   .trouble = atomic_load(&queue->trouble) };
}
