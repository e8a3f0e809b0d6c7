"""A process that takes over a guest from the one that serves it, as a child of the process that keeps the guest.

    vmbus successor --link FD --keeper FD [--supervised]

``link``: to the process that serves the guest now (:mod:`vmbus.machine.reload.predecessor`). ``keeper``: to the
process that started it, the one that the user has started: it keeps what has to outlive emulators, such as QEMU's
process and the output of the guest's command, and hears from here how the service ended. ``supervised``: and when it
has begun; such a worker is replaced when it is killed (:mod:`vmbus.machine.reload.supervisor`), and then ``link`` is
to the keeper, too.
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
    try:
        if path.is_file() and os.access(path, os.X_OK):
            return [str(path.absolute())]
    except OSError as error:  # a folder that this user may not enter, a name that is too long
        raise ReloadFailed(f"{path} cannot be started: {error.strerror}") from error
    raise ReloadFailed(f"{path} is not a program: name the `vmbus` of the other release")


class Worker:
    """A started process. Made by :meth:`start`."""

    def __init__(
        self,
        program: Sequence[str],
        process: subprocess.Popen[bytes],
        link: Link,
        keeper: Link,
        ended: asyncio.Future[None],
    ) -> None:
        self.program = program
        self.process = process
        self.link = link
        """The end of the process that serves the guest now."""
        self.keeper = keeper
        """The end of this process."""
        self._ended = ended

    @classmethod
    def start(cls, program: Sequence[str], *, supervised: bool = False) -> Worker:
        """Start ``program``; ``supervised``: it says when it serves the guest.

        Raises :class:`~vmbus.machine.reload.link.ReloadFailed`.
        """
        level = logging.getLogger().level
        words = ["-v"] * (2 if level <= logging.DEBUG else level <= logging.INFO)
        with contextlib.ExitStack() as failed:
            try:
                here, there = (failed.enter_context(each) for each in socket.socketpair())
                keeper_here, keeper_there = (failed.enter_context(each) for each in socket.socketpair())
                words += ["successor", "--link", str(there.fileno()), "--keeper", str(keeper_there.fileno())]
                words += ["--sandbox", "on" if confinement.enabled() else "off"]
                words += ["--supervised"] if supervised else []
                process = subprocess.Popen(
                    [*program, *words],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(there.fileno(), keeper_there.fileno()),
                    preexec_fn=_ends_with_parent(),
                )
                failed.callback(_kill, process)
                ended = _end(process)
            except (OSError, subprocess.SubprocessError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise ReloadFailed(f"{program[0]} cannot be started: {reason}") from error
            failed.pop_all()
        there.close()
        keeper_there.close()
        name = f"the new emulator (process {process.pid})"
        return cls(program, process, Link(here, name), Link(keeper_here, name), ended)

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


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _end(process: subprocess.Popen[bytes]) -> asyncio.Future[None]:
    """Return what is done when ``process`` has ended. Raises ``OSError``."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    descriptor = os.pidfd_open(process.pid)

    def ended() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        done.set_result(None)

    try:
        loop.add_reader(descriptor, ended)
    except OSError:
        os.close(descriptor)
        raise
    return done


def _ends_with_parent() -> Callable[[], None]:
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> None:
        os.setpgid(0, 0)  # Ctrl-C is for the process that the user started
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return enter
