/* SPDX-License-Identifier: MIT */
/* The engine's thread: commands, passes over the channels, sleep. */
#include <errno.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"

#define DOORBELL_RUNG 1
#define DOORBELL_ENGINE 2
#define MIN_BACK_OFF_NS UINT64_C(20000000)
#define MAX_BACK_OFF_NS UINT64_C(1280000000)
#define ASK_SPINS 100

uint64_t now_ns(void)
{
    struct timespec at;

    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void add_one(int fd)
{
    uint64_t one = 1;
    ssize_t written = write(fd, &one, sizeof(one));

    (void)written; /* EAGAIN: it is readable already */
}

/* ---- commands ---- */

static void give(struct engine *engine, const struct channel_setup *setup)
{
    struct channel *channel = &engine->channel[setup->number];
    uint64_t *page = engine->pages[setup->number];
    uint32_t opening = channel->opening, taken = channel->taken_number, done = channel->done_number;
    uint32_t in_flight = channel->in_flight, outstanding = channel->outstanding;
    struct channel_counts counts = channel->counts;

    memcpy(page, setup->page, (setup->in_pages + setup->out_pages) * sizeof(*page));
    *channel = (struct channel){
        .owner = OWNER_PYTHON,
        .opening = opening,
        .in = { page, (setup->in_pages - 1) << PAGE_SHIFT, setup->in_index },
        .out = { page + setup->in_pages, (setup->out_pages - 1) << PAGE_SHIFT, setup->out_index },
        .device = { .context = setup->context },
        .doorbell = setup->doorbell,
        .flag = (uint32_t *)(engine->setup.ram + setup->flag_offset),
        .flag_page = setup->flag_offset >> PAGE_SHIFT,
        .flag_bit = setup->flag_bit,
        .vector = setup->vector,
        .vcpu = { (uint32_t *)setup->idle, (uint64_t *)setup->pending, (uint64_t *)setup->missed },
        .line_length = setup->line_length,
        .masked = 1,
        .gives = setup->gives,
        .in_flight = in_flight,
        .outstanding = outstanding,
        .taken_number = taken,
        .done_number = done,
        .answered_number = done,
        .counts = counts,
    };
    memcpy(&channel->device.take, &setup->take, sizeof(setup->take));
    memcpy(&channel->device.complete, &setup->complete, sizeof(setup->complete));
    memcpy(channel->line, setup->line, sizeof(channel->line));
    if (engine->channels <= setup->number)
        engine->channels = setup->number + 1;
    __atomic_fetch_or(channel->doorbell, DOORBELL_ENGINE, __ATOMIC_SEQ_CST);
    /* Until `gives` is stored, the positions are those that Python has in the journal. */
    struct mirror_channel *copy = &((struct mirror *)engine->setup.mirror)->channel[setup->number];
    channel_mirror(engine, setup->number);
    __atomic_store_n(&copy->gives, channel->gives, __ATOMIC_RELEASE);
    STEP();
    channel->owner = OWNER_ENGINE;
    __atomic_store_n(&copy->owner, OWNER_ENGINE, __ATOMIC_RELEASE);
}

/* Slots that Python is done with: free, or with an answer that was held until a page was written through QEMU. */
static void take_released(struct engine *engine, uint64_t now)
{
    uint32_t tail = atomic_load_explicit(&engine->release_tail, memory_order_relaxed);
    uint32_t head = atomic_load_explicit(&engine->release_head, memory_order_acquire);

    for (; tail != head; tail++) {
        uint32_t slot = engine->release[tail % MAX_EVENTS];
        struct request *request = &engine->request[slot & ~RELEASE_ANSWER];
        if (slot & RELEASE_ANSWER) {
            request->noted = 0;
            request_answer(engine, slot & ~RELEASE_ANSWER, now);
        } else if (request->state == PYTHON) {
            request_free(engine, slot);
        }
    }
    atomic_store_explicit(&engine->release_tail, tail, memory_order_release);
}

/* From now on the rings are Python's; so are the answers that the guest does not have yet, in order. */
static void recall(struct engine *engine, struct command *command)
{
    struct channel *channel = &engine->channel[command->channel];

    if (channel->owner == OWNER_PYTHON)
        return;
    take_released(engine, now_ns());
    signal_settle(engine, channel);
    command->recalled.was_left = channel->owner == OWNER_LEFT;
    command->recalled.interrupt_owed = channel->line_owed;
    channel->owner = OWNER_PYTHON;
    __atomic_fetch_and(channel->doorbell, (uint8_t)~DOORBELL_ENGINE, __ATOMIC_SEQ_CST);
    command->recalled.read_index = channel->in.index;
    command->recalled.write_index = channel->out.index;
    command->recalled.outstanding = channel->outstanding;
    command->recalled.counts = channel->counts;
    for (uint32_t slot = channel->first_done; channel->done; channel->done--) {
        uint32_t next = engine->request[slot].next;
        engine->request[slot].state = PYTHON;
        request_mirror(engine, slot);
        event_put(engine, EVENT_ANSWERED, slot);
        slot = next;
    }
    channel_mirror(engine, command->channel);
}

/*
 * Use another mirror while no channel is given. To begin one, no channel may have been given before: else leave all as
 * it is. In one that this engine has left, slots are freed that were since.
 */
static void use_mirror(struct engine *engine, struct command *command)
{
    uint32_t used = 0;

    take_released(engine, now_ns());
    for (uint32_t i = 0; i < engine->channels; i++)
        used |= engine->channel[i].gives;
    for (uint32_t slot = 0; slot < MAX_SLOTS; slot++)
        if (engine->request[slot].state != FREE)
            used = 1;
        else if (!command->begins)
            __atomic_store_n(&command->mirror->slot[slot].state, FREE, __ATOMIC_RELEASE);
    if (command->begins && used) {
        command->mirror = NULL;
        return;
    }
    if (command->begins)
        mirror_begin(command->mirror);
    engine->setup.mirror = (uint8_t *)command->mirror;
}

static void forget(struct channel *channel)
{
    if (channel->owner == OWNER_PYTHON) {
        channel->opening++;
        channel->in_flight = channel->outstanding = 0;
        channel->counts = (struct channel_counts){ 0 };
    }
}

static void run_command(struct engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    struct command *command = engine->command;
    if (command) {
        if (command->kind == COMMAND_GIVE)
            give(engine, command->setup);
        else if (command->kind == COMMAND_RECALL)
            recall(engine, command);
        else if (command->kind == COMMAND_FORGET)
            forget(&engine->channel[command->channel]);
        else if (command->kind == COMMAND_MIRROR)
            use_mirror(engine, command);
        else if (command->kind == COMMAND_COUNTS) {
            command->counts = engine->counts;
            command->channel_counts = engine->channel[command->channel].counts;
        } else if (command->kind == COMMAND_OPEN_QUEUE)
            command->queue->number = queue_open(engine, command->queue);
        else if (command->kind == COMMAND_CLOSE_QUEUE)
            queue_close(engine, command->queue_number, now_ns());
        engine->command = NULL;
        atomic_store(&engine->wanted, 0);
        pthread_cond_broadcast(&engine->done);
    }
    pthread_mutex_unlock(&engine->lock);
}

/* ---- passes ---- */

static void submit(struct engine *engine)
{
    queues_kick(engine);
    if (engine->uring.unsubmitted) {
        engine->counts.submits++;
        uring_submit(&engine->uring, 0);
    }
    engine->unsubmitted_ns = 0;
}

static void submit_if_due(struct engine *engine, uint64_t now, uint32_t held)
{
    const struct policy *policy = &engine->setup.policy;
    uint32_t waiting = engine->uring.unsubmitted + engine->unkicked;

    if (!waiting)
        return;
    if (!engine->unsubmitted_ns)
        engine->unsubmitted_ns = now;
    if (waiting >= policy->batch || (waiting >= atomic_load(&engine->in_flight) && !held) ||
        now - engine->unsubmitted_ns >= policy->submit_after || now < engine->quiet_until_ns)
        submit(engine);
}

static uint32_t pass(struct engine *engine)
{
    uint32_t work = 0, held = 0;
    uint64_t now = now_ns();

    engine->counts.passes++;
    if (atomic_load_explicit(&engine->wanted, memory_order_acquire))
        run_command(engine);
    take_released(engine, now);
    for (uint32_t i = 0; i < engine->channels; i++)
        if (engine->channel[i].owner == OWNER_ENGINE) {
            work += rings_take(engine, i);
            held += engine->channel[i].done;
        }
    submit_if_due(engine, now, held);
    work += requests_collect(engine, now);
    for (uint32_t i = 0; i < engine->channels; i++)
        if (engine->channel[i].owner == OWNER_ENGINE) {
            rings_deliver(engine, &engine->channel[i], now);
            signal_look(engine, &engine->channel[i], now);
        }
    if (engine->rang) {
        engine->rang = 0;
        add_one(engine->event_fd);
    }
    return work;
}

/* ---- sleep ---- */

static int unfinished(const struct engine *engine)
{
    if (engine->uring.unsubmitted || engine->unkicked || engine->ended_count)
        return 1;
    for (uint32_t i = 0; i < engine->channels; i++) {
        const struct channel *channel = &engine->channel[i];
        if (channel->owner == OWNER_ENGINE &&
            (channel->waits_since || channel->line_owed || (channel->done && !channel->blocked)))
            return 1;
    }
    return 0;
}

/* Let guests signal, and return whether one has something already. */
static int unmask(struct engine *engine)
{
    int more = 0;

    for (uint32_t i = 0; i < engine->channels; i++)
        if (engine->channel[i].owner == OWNER_ENGINE)
            rings_mask(engine, &engine->channel[i], 0);
    full_fence();
    if (engine->first_free >= MAX_SLOTS)
        return 0; /* a request has to end first */
    for (uint32_t i = 0; i < engine->channels; i++)
        if (engine->channel[i].owner == OWNER_ENGINE && !engine->channel[i].blocked &&
            __atomic_load_n((uint32_t *)(engine->setup.ram + engine->channel[i].in.page[0] + RING_WRITE),
                            __ATOMIC_ACQUIRE) != engine->channel[i].in.index)
            more = 1;
    return more;
}

static void mask(struct engine *engine)
{
    for (uint32_t i = 0; i < engine->channels; i++)
        if (engine->channel[i].owner == OWNER_ENGINE)
            rings_mask(engine, &engine->channel[i], 1);
}

static int rung(struct engine *engine)
{
    for (uint32_t i = 0; i < engine->channels; i++)
        if (engine->channel[i].owner == OWNER_ENGINE &&
            __atomic_load_n(engine->channel[i].doorbell, __ATOMIC_ACQUIRE) & DOORBELL_RUNG)
            return 1;
    return 0;
}

static void answer_doorbells(struct engine *engine)
{
    for (uint32_t i = 0; i < engine->channels; i++) {
        struct channel *channel = &engine->channel[i];
        if (channel->owner == OWNER_ENGINE &&
            __atomic_load_n(channel->doorbell, __ATOMIC_RELAXED) & DOORBELL_RUNG) {
            __atomic_fetch_and(channel->doorbell, (uint8_t)~DOORBELL_RUNG, __ATOMIC_SEQ_CST);
            channel->counts.doorbells++;
            channel->blocked = 0;
        }
    }
}

static void arm(struct engine *engine)
{
    if (engine->armed)
        return;
    struct io_uring_sqe *entry = uring_entry(&engine->uring);
    if (!entry)
        return;
    entry->opcode = IORING_OP_POLL_ADD;
    entry->fd = engine->wake_fd;
    entry->poll32_events = POLLIN;
    entry->user_data = WAKE;
    engine->armed = 1;
}

/* Sleep in io_uring_enter until a transfer ends, the gateway rings, or Python wants something. */
static void rest(struct engine *engine)
{
    _Atomic uint32_t *waiting = (_Atomic uint32_t *)__atomic_load_n(&engine->setup.waiting, __ATOMIC_ACQUIRE);
    uint64_t count;

    if (unmask(engine) || queues_listen(engine)) {
        queues_ignore(engine);
        mask(engine);
        return;
    }
    atomic_store_explicit(waiting, 1, memory_order_relaxed);
    atomic_store_explicit(&engine->asleep, 1, memory_order_relaxed);
    full_fence();
    if (!rung(engine) && !atomic_load(&engine->wanted) && !atomic_load(&engine->stop) &&
        atomic_load(&engine->release_head) == atomic_load(&engine->release_tail)) {
        engine->counts.sleeps++;
        arm(engine);
        uring_submit(&engine->uring, 1);
    }
    atomic_store_explicit(waiting, 0, memory_order_relaxed);
    atomic_store_explicit(&engine->asleep, 0, memory_order_relaxed);
    ssize_t got = read(engine->wake_fd, &count, sizeof(count));
    (void)got;
    answer_doorbells(engine);
    queues_ignore(engine);
    mask(engine);
    engine->last_ns = now_ns();
}

/* Wait a moment without sleeping; a long gap means that the machine has no processor to spare. */
static void spin(struct engine *engine)
{
    uint64_t before = now_ns();

    sched_yield();
    uint64_t gap = now_ns() - before;
    if (gap > engine->setup.policy.gap) {
        engine->counts.gaps++;
        engine->back_off_ns = engine->back_off_ns ? 2 * engine->back_off_ns : MIN_BACK_OFF_NS;
        if (engine->back_off_ns > MAX_BACK_OFF_NS)
            engine->back_off_ns = MAX_BACK_OFF_NS;
        engine->quiet_until_ns = before + gap + engine->back_off_ns;
    } else if (engine->back_off_ns && before > engine->quiet_until_ns + engine->back_off_ns) {
        engine->back_off_ns = engine->back_off_ns > MIN_BACK_OFF_NS ? engine->back_off_ns / 2 : 0;
        engine->quiet_until_ns = before;
    }
}

static void *run(void *argument)
{
    struct engine *engine = argument;
    int opened = uring_open(&engine->uring, MAX_SLOTS / 2) == 0;

    pthread_mutex_lock(&engine->lock);
    engine->command = NULL;
    atomic_store(&engine->stop, opened ? 0 : 2);
    pthread_cond_broadcast(&engine->done);
    pthread_mutex_unlock(&engine->lock);
    if (!opened)
        return NULL;
    engine->last_ns = now_ns();
    while (!atomic_load_explicit(&engine->stop, memory_order_relaxed)) {
        if (pass(engine)) {
            engine->last_ns = now_ns();
            continue;
        }
        uint64_t now = now_ns();
        uint64_t window = atomic_load(&engine->in_flight) ? engine->setup.policy.spin_in_flight
                                                          : engine->setup.policy.spin_idle;
        if (unfinished(engine) || (now >= engine->quiet_until_ns && now - engine->last_ns < window))
            spin(engine);
        else
            rest(engine);
    }
    uring_close(&engine->uring);
    queues_free(engine);
    return NULL;
}

/* ---- for Python ---- */

/* Start an engine; NULL, with errno, where the kernel does not allow an io_uring. */
EXPORT struct engine *engine_start(const struct engine_setup *setup, int event_fd)
{
    struct engine *engine =
        mmap(NULL, sizeof(*engine), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct command starting = { 0 };
    sigset_t all, before;

    if (engine == MAP_FAILED)
        return NULL;
    engine->setup = *setup;
    engine->lines_limit = LINES_AHEAD;
    engine->wake_fd = setup->wake_fd;
    engine->event_fd = event_fd;
    for (uint32_t i = 0; i < MAX_SLOTS; i++)
        engine->request[i].next = i + 1;
    mirror_begin((struct mirror *)setup->mirror);
    pthread_mutex_init(&engine->asking, NULL);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->line_lock, NULL);
    pthread_cond_init(&engine->done, NULL);
    engine->command = &starting;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&engine->thread, NULL, run, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) {
        pthread_mutex_lock(&engine->lock);
        while (engine->command)
            pthread_cond_wait(&engine->done, &engine->lock);
        pthread_mutex_unlock(&engine->lock);
        if (!atomic_load(&engine->stop))
            return engine;
        pthread_join(engine->thread, NULL);
        error = ENOSYS;
    }
    munmap(engine, sizeof(*engine));
    errno = error;
    return NULL;
}

/* End the thread. Transfers that are under way end with its io_uring; return how many those were. */
EXPORT uint32_t engine_stop(struct engine *engine)
{
    atomic_store(&engine->stop, 1);
    add_one(engine->wake_fd);
    pthread_join(engine->thread, NULL);
    uint32_t left = atomic_load(&engine->in_flight);
    pthread_mutex_destroy(&engine->asking);
    pthread_mutex_destroy(&engine->lock);
    pthread_mutex_destroy(&engine->line_lock);
    pthread_cond_destroy(&engine->done);
    munmap(engine, sizeof(*engine));
    return left;
}

/* Have the thread execute a command, and wait until it has; in any thread. */
void engine_ask(struct engine *engine, struct command *command)
{
    pthread_mutex_lock(&engine->asking);
    pthread_mutex_lock(&engine->lock);
    engine->command = command;
    atomic_store(&engine->wanted, 1);
    pthread_mutex_unlock(&engine->lock);
    full_fence();
    if (atomic_load_explicit(&engine->asleep, memory_order_relaxed))
        add_one(engine->wake_fd);
    /* It mostly takes a few microseconds, less than a sleep. */
    for (int i = 0; i < ASK_SPINS && atomic_load_explicit(&engine->wanted, memory_order_acquire); i++)
        sched_yield();
    pthread_mutex_lock(&engine->lock);
    while (engine->command)
        pthread_cond_wait(&engine->done, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
    pthread_mutex_unlock(&engine->asking);
}

/* Give a channel whose rings Python does not touch any more. Return 0 for a description that cannot be. */
EXPORT uint32_t engine_give(struct engine *engine, struct channel_setup *setup)
{
    if (setup->number >= MAX_CHANNELS || setup->in_pages < 2 || setup->out_pages < 2 ||
        setup->in_pages > MAX_RING_PAGES || setup->out_pages > MAX_RING_PAGES - setup->in_pages ||
        setup->line_length > LINE_SIZE || engine->channel[setup->number].owner != OWNER_PYTHON)
        return 0;
    for (uint32_t i = 0; i < setup->in_pages + setup->out_pages; i++)
        if (setup->page[i] & (PAGE - 1) || setup->page[i] + PAGE > engine->setup.ram_size)
            return 0;
    if (setup->in_index >= (setup->in_pages - 1) << PAGE_SHIFT ||
        setup->out_index >= (setup->out_pages - 1) << PAGE_SHIFT || (setup->in_index | setup->out_index) & 7)
        return 0;
    struct command command = { .kind = COMMAND_GIVE, .setup = setup };
    engine_ask(engine, &command);
    return 1;
}

/*
 * Take a channel back. When this returns, the engine does not touch the rings, and answers that the guest does not
 * have are events. Transfers under way end later, as events too.
 */
EXPORT void engine_recall(struct engine *engine, uint32_t channel, struct recalled *recalled)
{
    struct command command = { .kind = COMMAND_RECALL, .channel = channel };

    engine_ask(engine, &command);
    *recalled = command.recalled;
}

/* End the opening of a recalled channel: requests of the next one are not mixed up with those that are under way. */
EXPORT void engine_forget(struct engine *engine, uint32_t channel)
{
    struct command command = { .kind = COMMAND_FORGET, .channel = channel };

    engine_ask(engine, &command);
}

/* Write the mirror into other memory from now on. Return 0, and do nothing, if it `begins`, and is too late. */
EXPORT uint32_t engine_use_mirror(struct engine *engine, void *mirror, uint32_t begins)
{
    struct command command = { .kind = COMMAND_MIRROR, .mirror = mirror, .begins = begins };

    engine_ask(engine, &command);
    return command.mirror != NULL;
}

EXPORT void engine_get_counts(struct engine *engine, uint32_t channel, struct engine_counts *counts,
                              struct channel_counts *of_channel)
{
    struct command command = { .kind = COMMAND_COUNTS, .channel = channel };

    engine_ask(engine, &command);
    *counts = command.counts;
    *of_channel = command.channel_counts;
}

/* Copy the next event; return 0 if there is none. */
EXPORT uint32_t engine_event(struct engine *engine, struct event *event)
{
    uint32_t tail = atomic_load_explicit(&engine->event_tail, memory_order_relaxed);

    if (tail == atomic_load_explicit(&engine->event_head, memory_order_acquire))
        return 0;
    *event = engine->event[tail % MAX_EVENTS];
    if (event->kind == EVENT_LINES)
        atomic_store(&engine->lines_told, 0);
    atomic_store_explicit(&engine->event_tail, tail + 1, memory_order_release);
    return 1;
}

/* Return a slot of an event: free, or with `answer` to go on to the guest. */
EXPORT void engine_release(struct engine *engine, uint32_t slot, uint32_t answer)
{
    uint32_t head = atomic_load_explicit(&engine->release_head, memory_order_relaxed);

    engine->release[head % MAX_EVENTS] = slot | (answer ? RELEASE_ANSWER : 0);
    atomic_store_explicit(&engine->release_head, head + 1, memory_order_seq_cst);
    full_fence();
    if (atomic_load_explicit(&engine->asleep, memory_order_relaxed))
        add_one(engine->wake_fd);
}

/* How many slots were returned, and are free or go on to the guest by now; modulo 2^32. */
EXPORT uint32_t engine_freed(struct engine *engine)
{
    return atomic_load_explicit(&engine->release_tail, memory_order_acquire);
}

/* What the slot of an event holds; valid until it is released. */
EXPORT const uint8_t *engine_packet(struct engine *engine, uint32_t slot, uint32_t *size)
{
    *size = engine->request[slot].size;
    return engine->request[slot].packet;
}

EXPORT const uint8_t *engine_answer(struct engine *engine, uint32_t slot, uint32_t *size)
{
    *size = engine->request[slot].answer_size;
    return engine->request[slot].answer;
}

/*
 * `all`: these are all ranges that were stored into, and their notes are as they were; else those whose note was
 * cleared.
 */
EXPORT const struct range *engine_ranges(struct engine *engine, uint32_t slot, uint32_t *count, uint32_t *all)
{
    *count = engine->request[slot].noted;
    *all = engine->request[slot].all_noted;
    return engine->request[slot].range;
}

EXPORT uint32_t engine_channel_of(struct engine *engine, uint32_t slot, uint32_t *opening, uint32_t *number)
{
    *opening = engine->request[slot].opening;
    *number = engine->request[slot].taken_number;
    return engine->request[slot].channel;
}

/* Say at another address that the engine sleeps, from the next sleep on. No channel is given. */
EXPORT void engine_use_waiting(struct engine *engine, uint64_t waiting)
{
    __atomic_store_n(&engine->setup.waiting, waiting, __ATOMIC_RELEASE);
}

/* Report every range that is stored into, from the next request that ends on; or only those with code. */
EXPORT void engine_report_ranges(struct engine *engine, uint32_t on)
{
    __atomic_store_n(&engine->setup.report_ranges, on, __ATOMIC_RELAXED);
}

EXPORT uint32_t engine_outstanding(struct engine *engine, uint32_t channel)
{
    return __atomic_load_n(&engine->channel[channel].outstanding, __ATOMIC_RELAXED);
}

EXPORT uint32_t engine_in_flight(struct engine *engine)
{
    return atomic_load(&engine->in_flight);
}

/* Keep the engine from writing to QEMU's socket, or end that; not for longer than it takes to write a command. */
EXPORT void engine_lock_lines(struct engine *engine, uint32_t on)
{
    if (on)
        pthread_mutex_lock(&engine->line_lock);
    else
        pthread_mutex_unlock(&engine->line_lock);
}

/* Allow so many commands to QEMU, those that were sent included. */
EXPORT void engine_allow_lines(struct engine *engine, uint64_t limit)
{
    atomic_store_explicit(&engine->lines_limit, limit, memory_order_release);
}

EXPORT uint64_t engine_lines(struct engine *engine)
{
    return atomic_load_explicit(&engine->lines, memory_order_acquire);
}

EXPORT uint64_t engine_setup_size(void)
{
    return sizeof(struct engine_setup) + sizeof(struct channel_setup) + sizeof(struct mirror) +
           sizeof(struct queue_setup) + sizeof(struct queue_state);
}
