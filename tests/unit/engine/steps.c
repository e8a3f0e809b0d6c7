/* SPDX-License-Identifier: MIT */
/* The process ends at a step of the engine, which tests choose. */
#include <signal.h>
#include <unistd.h>

__attribute__((visibility("default"))) unsigned long engine_die_at;

void engine_step(void)
{
    static unsigned long steps;

    if (++steps == engine_die_at)
        kill(getpid(), SIGKILL);
}
