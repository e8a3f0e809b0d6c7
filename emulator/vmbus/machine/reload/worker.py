"""A process that takes over a guest from the one that serves it, as a child of the process that keeps the guest.

    vmbus successor --link FD --keeper FD

``link``: to the process that serves the guest now (:mod:`vmbus.machine.reload.predecessor`). ``keeper``: to the
process that started it, the one that the user has started: it keeps what has to outlive emulators, such as QEMU's
process and the output of the guest's command, and hears from here how the service ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vmbus.machine.reload.link import Link, ReloadFailed
from vmbus.sandbox import confinement

_logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_END_TIMEOUT = 10.0
"""Seconds in which a worker ends when it is told to."""


def own_program() -> list[str]:
    """Return the command line of ``vmbus`` in the Python that runs this process."""
    return [sys.executable, "-m", "vmbus"]


def named_program(path: Path) -> list[str]:
    """Return the command line of another release's ``vmbus``.

    Raises :class:`~vmbus.machine.reload.link.ReloadFailed` if ``path`` cannot be executed.
    """
    if not path.is_file() or not os.access(path, os.X_OK):
        raise ReloadFailed(f"{path} is not a program: name the `vmbus` of the other release")
    return [str(path.absolute())]


class Worker:
    """A started process. Made by :meth:`start`."""

    def __init__(self, process: subprocess.Popen[bytes], link: Link, keeper: Link) -> None:
        self.process = process
        self.link = link
        """The end of the process that serves the guest now."""
        self.keeper = keeper
        """The end of this process."""
        self._ended = asyncio.ensure_future(_readable(os.pidfd_open(process.pid)))

    @classmethod
    def start(cls, program: Sequence[str]) -> Worker:
        """Start ``program``. Raises :class:`~vmbus.machine.reload.link.ReloadFailed`."""
        here, there = socket.socketpair()
        keeper_here, keeper_there = socket.socketpair()
        level = logging.getLogger().level
        words = ["-v"] * (2 if level <= logging.DEBUG else level <= logging.INFO)
        words += ["successor", "--link", str(there.fileno()), "--keeper", str(keeper_there.fileno())]
        words += ["--sandbox", "on" if confinement.enabled() else "off"]
        try:
            with there, keeper_there:
                process = subprocess.Popen(
                    [*program, *words],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(there.fileno(), keeper_there.fileno()),
                    preexec_fn=_ends_with_parent(),
                )
        except OSError as error:
            here.close()
            keeper_here.close()
            raise ReloadFailed(f"{program[0]} cannot be started: {error.strerror}") from error
        name = f"the new emulator (process {process.pid})"
        return cls(process, Link(here, name), Link(keeper_here, name))

    async def ended(self) -> str:
        """Wait until the process has ended; return how, in words."""
        await asyncio.shield(self._ended)
        status = self.process.wait()
        if status < 0 and -status in set(signal.Signals):
            return f"process {self.process.pid} ended by {signal.Signals(-status).name}"
        return f"process {self.process.pid} ended with status {status}"

    def tell_to_end(self) -> None:
        """Ask the process to end its service; QEMU goes on."""
        if not self._ended.done():
            self.process.terminate()

    async def close(self) -> str:
        """End the process, and wait until it has ended; return how, in words."""
        self.link.close()
        self.keeper.close()
        if not self._ended.done():
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._ended), _END_TIMEOUT)
        if not self._ended.done():
            _logger.warning("process %d does not end; it is killed", self.process.pid)
            self.process.kill()
        return await self.ended()


async def _readable(descriptor: int) -> None:
    """Wait until ``descriptor`` is readable, and close it."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(descriptor, done.set)
    try:
        await done.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _ends_with_parent() -> Callable[[], None]:
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> None:
        os.setpgid(0, 0)  # Ctrl-C is for the process that the user started
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return enter
