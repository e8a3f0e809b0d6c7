/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The journal: memory that outlives emulators. What one writes there, the next one reads, also if the first was killed.
 * The gateway makes it when it is asked for the first time, holds it as long as QEMU runs, and never looks into it.
 */
#define _GNU_SOURCE
#include "gateway.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static int journal_fd = -1; /* only the listener's thread uses it */

/* Return a descriptor of the journal, which stays open; or -1, with the reason in errno. */
int journal_memory(void)
{
    if (journal_fd >= 0) {
        return journal_fd;
    }
    int made = memfd_create("vmbus-journal", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (made < 0) {
        return -1;
    }
    if (ftruncate(made, GATEWAY_JOURNAL_SIZE) != 0 ||
        fcntl(made, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        int reason = errno;
        close(made);
        errno = reason;
        return -1;
    }
    journal_fd = made;
    return journal_fd;
}
