/*
 * A VMBus channel in the hands of a user program: finding the device, opening it through uio_hv_generic, signals
 * in both directions (docs/protocol/devices.md#generic-channels).
 *
 * For tests of the program itself there is a second kind of link, without any kernel: a file that holds both
 * rings and some pages, and a socket in the place of /dev/uioN that carries the same four bytes.
 */
#ifndef UIO_LINK_H
#define UIO_LINK_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "ring.h"

#define VMBUS "/sys/bus/vmbus/"
#define DRIVER VMBUS "drivers/uio_hv_generic/"
#define BUFFER_PAGES 4

struct link {
	int fd;
	struct ring tx, rx;
	void *rings;
	size_t rings_size;
	uint8_t *buffer;     /* BUFFER_PAGES pages, writable and executable, locked */
	uint64_t buffer_gpa; /* loop-back only: where they are for the host */
	uint32_t *pending;   /* monitored channels only: the word of our bit in the monitor page */
	uint32_t pending_bit;
	bool loopback;
	int timeout; /* seconds that any wait may take */
	uint64_t interrupts, signals;
};

static const char *current_test = "start";
static bool line_begun; /* a line of results stands open on the output */

/* Ends the program with a line that a script can read. */
__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
	va_list arguments;

	printf("%s\"ok\": false, \"test\": \"%s\", \"error\": \"", line_begun ? ", " : "{", current_test);
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\"}\n");
	exit(1);
}

static bool read_line(const char *path, char *line, size_t size)
{
	FILE *file = fopen(path, "re");
	bool ok = file && fgets(line, (int)size, file);

	if (file)
		fclose(file);
	if (ok)
		line[strcspn(line, "\n")] = 0;
	return ok;
}

static bool write_line(const char *path, const char *line)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, line, strlen(line)) == (ssize_t)strlen(line);

	if (fd >= 0)
		close(fd);
	return ok;
}

/* The sysfs name (the instance GUID) of the `nth` device with this interface GUID, if it is there. */
static bool look_for_device(const char *interface_guid, int nth, char *name, size_t size)
{
	char path[512], line[128], wanted[64];
	DIR *folder = opendir(VMBUS "devices");
	struct dirent *entry;
	bool found = false;

	if (!folder)
		fail("no " VMBUS "devices: this guest has no VMBus");
	snprintf(wanted, sizeof wanted, "{%s}", interface_guid);
	while (!found && (entry = readdir(folder))) {
		snprintf(path, sizeof path, VMBUS "devices/%.200s/class_id", entry->d_name);
		if (entry->d_name[0] == '.' || !read_line(path, line, sizeof line) || strcmp(line, wanted) != 0)
			continue;
		found = nth-- == 0;
		if (found)
			snprintf(name, size, "%s", entry->d_name);
	}
	closedir(folder);
	return found;
}

/* The same; it may still be on its way, as Linux works on offers after the bus driver has been loaded. */
static void find_device(const char *interface_guid, int nth, char *name, size_t size)
{
	for (int attempt = 0; attempt < 200; attempt++) {
		if (look_for_device(interface_guid, nth, name, size))
			return;
		usleep(50000);
	}
	fail("no device of interface %s is offered", interface_guid);
}

/* The number N of the /dev/uioN that belongs to a VMBus device; -1: none. */
static int uio_number(const char *device)
{
	char path[512];
	int number = -1;
	struct dirent *entry;
	DIR *folder;

	snprintf(path, sizeof path, VMBUS "devices/%s/uio", device);
	folder = opendir(path);
	while (folder && (entry = readdir(folder)))
		if (sscanf(entry->d_name, "uio%d", &number) == 1)
			break;
	if (folder)
		closedir(folder);
	return number;
}

/* Hands the device to uio_hv_generic, which has to be loaded. */
static int bind_device(const char *interface_guid, const char *device)
{
	int number = uio_number(device);

	for (int attempt = 0; number < 0 && attempt < 100; attempt++) {
		if (access(DRIVER, F_OK) != 0)
			fail("no " DRIVER ": load the module uio_hv_generic first");
		/* A known id, or a device that the new id has bound already, are no errors: what counts is uioN. */
		if (attempt == 0)
			write_line(DRIVER "new_id", interface_guid);
		number = uio_number(device);
		if (number < 0) {
			write_line(DRIVER "bind", device);
			number = uio_number(device);
		}
		if (number < 0)
			usleep(50000);
	}
	if (number < 0)
		fail("uio_hv_generic did not take device %s", device);
	return number;
}

static int open_uio(int number)
{
	char path[64], line[64];
	unsigned device_major, device_minor;
	int fd;

	snprintf(path, sizeof path, "/dev/uio%d", number);
	if (access(path, F_OK) != 0) {
		char sysfs[64];

		snprintf(sysfs, sizeof sysfs, "/sys/class/uio/uio%d/dev", number);
		if (read_line(sysfs, line, sizeof line) && sscanf(line, "%u:%u", &device_major, &device_minor) == 2)
			mknod(path, S_IFCHR | 0600, makedev(device_major, device_minor));
	}
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail("open %s: %s", path, strerror(errno));
	return fd;
}

static void link_attach(struct link *link)
{
	size_t half = link->rings_size / 2;

	if (link->rings == MAP_FAILED)
		fail("cannot map %zu bytes of rings: %s", link->rings_size, strerror(errno));
	if (half < 2 * RING_PAGE || half % RING_PAGE)
		fail("%zu bytes are no two rings", link->rings_size);
	ring_attach(&link->tx, link->rings, half, true);
	ring_attach(&link->rx, (uint8_t *)link->rings + half, half, false);
	ring_store(&link->rx, RING_MASK, 1);
}

/*
 * A channel that has a monitor (Linux shows its number only then) is signalled by a bit in the page that guest
 * and host share, the third map of the device: 32-bit words from byte 8 on, eight bytes apart.
 */
static void link_find_monitor(struct link *link, const char *device)
{
	char path[320], line[64];
	unsigned id;
	uint8_t *page;

	link->pending = NULL;
	snprintf(path, sizeof path, "/sys/bus/vmbus/devices/%s/monitor_id", device);
	if (!read_line(path, line, sizeof line) || sscanf(line, "%u", &id) != 1 || id > 127)
		return;
	page = mmap(NULL, RING_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, link->fd, 2 * RING_PAGE);
	if (page == MAP_FAILED)
		fail("cannot map the monitor page: %s", strerror(errno));
	link->pending = (uint32_t *)(void *)(page + 8 + id / 32 * 8);
	link->pending_bit = 1u << id % 32;
}

static void link_open_device(struct link *link, const char *interface_guid, int nth)
{
	char device[256], path[128], line[64];
	int number;

	find_device(interface_guid, nth, device, sizeof device);
	number = bind_device(interface_guid, device);
	link->fd = open_uio(number);
	snprintf(path, sizeof path, "/sys/class/uio/uio%d/maps/map0/size", number);
	if (!read_line(path, line, sizeof line))
		fail("no size in %s", path);
	link->rings_size = strtoul(line, NULL, 0);
	link->rings = mmap(NULL, link->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED, link->fd, 0);
	link_attach(link);
	link_find_monitor(link, device);
	if (!link->buffer) {
		link->buffer = mmap(NULL, BUFFER_PAGES * RING_PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		if (link->buffer == MAP_FAILED || mlock(link->buffer, BUFFER_PAGES * RING_PAGE) != 0)
			fail("cannot lock a page: %s", strerror(errno));
		memset(link->buffer, 0, BUFFER_PAGES * RING_PAGE);
	}
}

/* `description`: FILE,RING_BYTES,FD: both rings, then BUFFER_PAGES pages; guest physical = offset in FILE. */
__attribute__((unused)) static void link_open_loopback(struct link *link, const char *description)
{
	char path[512];
	int file;

	if (sscanf(description, "%511[^,],%zu,%d", path, &link->rings_size, &link->fd) != 3)
		fail("--loopback wants FILE,RING_BYTES,FD");
	file = open(path, O_RDWR | O_CLOEXEC);
	if (file < 0)
		fail("open %s: %s", path, strerror(errno));
	link->loopback = true;
	link->rings = mmap(NULL, link->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	link->buffer = mmap(NULL, BUFFER_PAGES * RING_PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, file,
			    (off_t)link->rings_size);
	link->buffer_gpa = link->rings_size;
	close(file);
	if (link->buffer == MAP_FAILED)
		fail("cannot map the buffer: %s", strerror(errno));
	link_attach(link);
}

static void link_close(struct link *link)
{
	munmap(link->rings, link->rings_size);
	if (link->pending)
		munmap((void *)((uintptr_t)link->pending & ~(uintptr_t)(RING_PAGE - 1)), RING_PAGE);
	if (!link->loopback)
		close(link->fd);
}

/* The page frame number of page `page` of the buffer, as it is now. */
__attribute__((unused)) static uint64_t buffer_pfn(const struct link *link, unsigned page)
{
	uint64_t entry = 0, address = (uintptr_t)link->buffer + (uint64_t)page * RING_PAGE;
	int fd;

	if (link->loopback)
		return link->buffer_gpa / RING_PAGE + page;
	fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || pread(fd, &entry, sizeof entry, (off_t)(address / RING_PAGE * 8)) != sizeof entry)
		fail("cannot read /proc/self/pagemap: %s", strerror(errno));
	close(fd);
	if (!(entry >> 63) || !(entry & ((1ull << 55) - 1)))
		fail("the physical address of a locked page is hidden: run as root");
	return entry & ((1ull << 55) - 1);
}

__attribute__((unused)) static void link_signal(struct link *link)
{
	uint32_t one = 1;

	link->signals++;
	if (link->pending) {
		__atomic_fetch_or(link->pending, link->pending_bit, __ATOMIC_SEQ_CST);
		return;
	}
	/* Kernels up to 6.17 also unmask our ring here; it costs one interrupt too many at worst. */
	if (write(link->fd, &one, sizeof one) != sizeof one)
		fail("cannot signal the host: %s", strerror(errno));
}

/* Sleeps until the host interrupts, or something is in the ring. */
__attribute__((unused)) static void link_wait(struct link *link)
{
	struct pollfd event = { .fd = link->fd, .events = POLLIN };
	uint32_t count;
	int ready;

	ring_store(&link->rx, RING_MASK, 0);
	if (ring_empty(&link->rx)) {
		do
			ready = poll(&event, 1, link->timeout * 1000);
		while (ready < 0 && errno == EINTR);
		if (ready == 0)
			fail("nothing came from the host in %d s (tx %u/%u mask %u pending %u, rx %u/%u)",
			     link->timeout, ring_load(&link->tx, RING_READ), ring_load(&link->tx, RING_WRITE),
			     ring_load(&link->tx, RING_MASK), ring_load(&link->tx, RING_PENDING),
			     ring_load(&link->rx, RING_READ), ring_load(&link->rx, RING_WRITE));
		if (read(link->fd, &count, sizeof count) != sizeof count)
			fail("the device is gone: %s", strerror(errno));
		link->interrupts++;
	}
	ring_store(&link->rx, RING_MASK, 1);
}

__attribute__((unused)) static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

#endif
