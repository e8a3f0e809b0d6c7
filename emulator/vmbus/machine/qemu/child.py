"""Child processes that do not outlive the emulator, and can do only what they are for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator

from vmbus.private import UMASK
from vmbus.sandbox import memory
from vmbus.sandbox.confinement import Confinement, prepared

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def in_child(confinement: Confinement | None) -> Iterator[Callable[[], None]]:
    """Yield a ``preexec_fn``: the kernel kills the child when this process ends, even by SIGKILL, and confines it.

    Files that the child makes (sockets, guest memory, states, consoles) get no permissions for other users.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)
    with prepared(confinement) as confine:

        def enter() -> None:
            os.umask(UMASK)
            memory.lift()
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # this process ended before the line above
                os._exit(1)
            confine()

        yield enter
