/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The socket: a thread that gives the shared memory to one emulator at a time.
 *
 *      NONE --HELLO--> ATTACHED --ACTIVATE--> ACTIVE --connection ends--> NONE
 *
 * The connection is the attachment: when it ends, for whatever cause, the emulator counts as gone. The thread does
 * not access QEMU's data.
 */
#define _GNU_SOURCE
#include "gateway.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECTIONS 8
#define BACKLOG 64

struct connection {
    int fd; /* -1: free */
    bool attached;
    pid_t pid;
    size_t filled;
    struct gateway_message message;
};

static struct connection connections[CONNECTIONS];

static void emulator_set(uint32_t state)
{
    struct gateway_control *control = gateway.control;

    pthread_mutex_lock(&gateway.lock);
    if (state == EMULATOR_NONE) {
        gateway.gone_since_ns = clock_ns();
    }
    if (state == EMULATOR_ACTIVE) {
        atomic_store(&control->was_active, 1);
    }
    atomic_store(&control->emulator, state);
    pthread_mutex_unlock(&gateway.lock);
    syscall(SYS_futex, &control->emulator, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void connection_end(struct connection *connection)
{
    if (connection->attached) {
        emulator_set(EMULATOR_NONE);
        posts_withdraw();
    }
    close(connection->fd);
    *connection = (struct connection){ .fd = -1 };
}

static struct connection *attached_connection(void)
{
    for (int i = 0; i < CONNECTIONS; i++) {
        if (connections[i].fd >= 0 && connections[i].attached) {
            return &connections[i];
        }
    }
    return NULL;
}

static bool reply(const struct connection *connection, uint32_t type, uint32_t status, uint64_t argument,
                  const int *descriptors, size_t count)
{
    struct gateway_reply body = {
        .magic = GATEWAY_MESSAGE_MAGIC,
        .type = type,
        .status = status,
        .version = GATEWAY_VERSION,
        .argument = argument,
    };
    struct iovec part = { .iov_base = &body, .iov_len = sizeof(body) };
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control = { 0 };
    struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

    if (count) {
        message.msg_control = control.space;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), descriptors, count * sizeof(int));
    }
    return sendmsg(connection->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof(body);
}

/* Put a new eventfd behind the number *fd, or make one: vCPUs may be writing to it. */
static bool new_eventfd(int *fd)
{
    int made = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    if (made < 0) {
        return false;
    }
    if (*fd < 0) {
        __atomic_store_n(fd, made, __ATOMIC_RELAXED);
        return true;
    }
    bool replaced = dup3(made, *fd, O_CLOEXEC) >= 0;
    close(made);
    return replaced;
}

static bool engine(struct connection *connection)
{
    if (!new_eventfd(&gateway.engine_fd)) {
        return reply(connection, MESSAGE_ENGINE, STATUS_REFUSED, 0, NULL, 0);
    }
    return reply(connection, MESSAGE_ENGINE, STATUS_OK, 0, &gateway.engine_fd, 1);
}

static bool journal(struct connection *connection)
{
    int memory = journal_memory();

    if (memory < 0) {
        return reply(connection, MESSAGE_JOURNAL, STATUS_REFUSED, (uint64_t)errno, NULL, 0);
    }
    return reply(connection, MESSAGE_JOURNAL, STATUS_OK, GATEWAY_JOURNAL_SIZE, &memory, 1);
}

static bool hello(struct connection *connection)
{
    const struct gateway_message *message = &connection->message;
    struct connection *other = attached_connection();

    if (message->version != GATEWAY_VERSION) {
        reply(connection, MESSAGE_HELLO, STATUS_VERSION, 0, NULL, 0);
        return false;
    }
    if (other == connection) {
        return false;
    }
    if (other && !(message->flags & HELLO_TAKEOVER)) {
        reply(connection, MESSAGE_HELLO, STATUS_BUSY, (uint64_t)other->pid, NULL, 0);
        return false;
    }
    if (other) {
        uint64_t one = 1;
        ssize_t written = write(gateway.event_fd, &one, sizeof(one)); /* wake it, so that it sees the takeover */
        (void)written;
        connection_end(other);
    }
    /* A new eventfd for each emulator: a previous one that still reads the old eventfd must not consume events. */
    if (!new_eventfd(&gateway.event_fd)) {
        reply(connection, MESSAGE_HELLO, STATUS_REFUSED, 0, NULL, 0);
        return false;
    }
    atomic_store(&gateway.control->engine_waiting, 0);
    posts_new_owner();
    connection->attached = true;
    emulator_set(EMULATOR_ATTACHED);
    clock_refresh(true);
    const int both[2] = { gateway.memory_fd, gateway.event_fd };
    return reply(connection, MESSAGE_HELLO, STATUS_OK, gateway.region_size, both, 2);
}

/* Return false if the connection is to be closed. */
static bool handle(struct connection *connection)
{
    const struct gateway_message *message = &connection->message;

    if (message->magic != GATEWAY_MESSAGE_MAGIC) {
        return false;
    }
    if (message->type == MESSAGE_HELLO) {
        return hello(connection);
    }
    if (!connection->attached) {
        return false;
    }
    switch (message->type) {
    case MESSAGE_ACTIVATE:
        emulator_set(EMULATOR_ACTIVE);
        break;
    case MESSAGE_CLOCK:
        clock_refresh(true);
        break;
    case MESSAGE_ENGINE:
        return engine(connection);
    case MESSAGE_JOURNAL:
        return journal(connection);
    default: /* of a newer emulator, which can do without it */
        return reply(connection, message->type, STATUS_UNKNOWN, 0, NULL, 0);
    }
    return reply(connection, message->type, STATUS_OK, 0, NULL, 0);
}

static void receive(struct connection *connection)
{
    uint8_t *target = (uint8_t *)&connection->message + connection->filled;
    ssize_t got = recv(connection->fd, target, sizeof(connection->message) - connection->filled, MSG_DONTWAIT);

    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (got <= 0) {
        connection_end(connection);
        return;
    }
    connection->filled += (size_t)got;
    if (connection->filled == sizeof(connection->message)) {
        connection->filled = 0;
        if (!handle(connection)) {
            connection_end(connection);
        }
    }
}

static void accept_one(void)
{
    struct ucred peer;
    socklen_t length = sizeof(peer);
    int fd = accept4(gateway.listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd < 0) {
        return;
    }
    struct connection candidate = { .fd = fd };
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0 || (peer.uid != 0 && peer.uid != geteuid())) {
        reply(&candidate, MESSAGE_HELLO, STATUS_REFUSED, 0, NULL, 0);
        close(fd);
        return;
    }
    candidate.pid = peer.pid;
    for (int i = 0; i < CONNECTIONS; i++) {
        if (connections[i].fd < 0) {
            connections[i] = candidate;
            return;
        }
    }
    /* All entries are in use: replace a connection that is not attached. */
    for (int i = 0; i < CONNECTIONS; i++) {
        if (!connections[i].attached) {
            connection_end(&connections[i]);
            connections[i] = candidate;
            return;
        }
    }
    close(fd);
}

static void *listen_for_ever(void *unused)
{
    struct pollfd polled[CONNECTIONS + 1];
    (void)unused;

    for (;;) {
        polled[0] = (struct pollfd){ .fd = gateway.listen_fd, .events = POLLIN };
        for (int i = 0; i < CONNECTIONS; i++) {
            polled[i + 1] = (struct pollfd){ .fd = connections[i].fd, .events = POLLIN };
        }
        if (poll(polled, CONNECTIONS + 1, -1) < 0) {
            continue;
        }
        for (int i = 0; i < CONNECTIONS; i++) {
            if (polled[i + 1].revents && connections[i].fd == polled[i + 1].fd && connections[i].fd >= 0) {
                receive(&connections[i]);
            }
        }
        if (polled[0].revents) {
            accept_one();
        }
    }
    return NULL;
}

/* Remove a stale socket. Return false if a process listens on it, or if it is not a socket. */
static bool clear_the_way(const struct sockaddr_un *address)
{
    struct stat found;

    if (lstat(address->sun_path, &found) != 0) {
        return errno == ENOENT;
    }
    if (!S_ISSOCK(found.st_mode)) {
        return false;
    }
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0) {
        return false;
    }
    bool dead = connect(probe, (const struct sockaddr *)address, sizeof(*address)) != 0 && errno == ECONNREFUSED;
    close(probe);
    return dead && unlink(address->sun_path) == 0;
}

static bool thread_start(void)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&gateway.listener, NULL, listen_for_ever, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        fprintf(stderr, "vmbus gateway: cannot start the listener thread: %s\n", strerror(error));
    }
    return !error;
}

bool listener_start(void)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };

    for (int i = 0; i < CONNECTIONS; i++) {
        connections[i].fd = -1;
    }
    if (strlen(gateway.socket_path) >= sizeof(address.sun_path)) {
        fprintf(stderr, "vmbus gateway: the socket path is longer than %zu bytes: %s\n", sizeof(address.sun_path) - 1,
                gateway.socket_path);
        return false;
    }
    strcpy(address.sun_path, gateway.socket_path);
    if (!clear_the_way(&address)) {
        fprintf(stderr, "vmbus gateway: %s is in use: choose another socket path\n", gateway.socket_path);
        return false;
    }
    gateway.listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t mask = umask(0177);
    int bound = gateway.listen_fd < 0
                    ? -1
                    : bind(gateway.listen_fd, (const struct sockaddr *)&address, sizeof(address));
    umask(mask);
    if (bound != 0 || listen(gateway.listen_fd, BACKLOG) != 0) {
        fprintf(stderr, "vmbus gateway: cannot listen on %s: %s\n", gateway.socket_path, strerror(errno));
        return false;
    }
    /* QEMU loads plug-ins after -daemonize has forked (measured), so the thread is in the right process. */
    return thread_start();
}

void listener_unlink(void)
{
    unlink(gateway.socket_path);
}
