"""Child processes that do not outlive the emulator, and can do only what they are for."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import termios
from collections.abc import Callable, Iterator

from vmbus.private import UMASK
from vmbus.sandbox import memory
from vmbus.sandbox.confinement import Confinement, prepared

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def in_child(confinement: Confinement | None) -> Iterator[Callable[[], None]]:
    """Yield a ``preexec_fn``: the kernel kills the child when this process ends, even by SIGKILL, and confines it.

    The child has a process group of its own and no terminal, so Ctrl-C is for the emulator alone, and nothing that it
    does reaches the user's shell. It stays in the session: Linux divides processor time between sessions first
    (autogroups, sched(7)), and a request that passes from QEMU's thread to the emulator's and back would wait for the
    other programs of the machine each time.

    Files that the child makes (sockets, guest memory, states, consoles) get no permissions for other users.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)
    with prepared(confinement) as confine:

        def enter() -> None:
            os.umask(UMASK)
            _leave_terminal()
            os.setpgid(0, 0)
            memory.lift()
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # this process ended before the line above
                os._exit(1)
            confine()

        yield enter


def _leave_terminal() -> None:
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return  # there is none
    fcntl.ioctl(terminal, termios.TIOCNOTTY)
    os.close(terminal)
