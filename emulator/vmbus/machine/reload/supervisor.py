"""Takes a guest over from a worker that was killed, for the process that keeps the guest.

    worker ends without a word ──→ start the next one, which gets the control socket
    recover: QMP socket, options ─────────────────→ attaches to QEMU, and goes on from the guest's journal
                ←───────────────────────────────── recovered
                ←───────────────────────────────── left: the guest is not in this QEMU any more
                ←───────────────────────────────── refused: it cannot be taken over, and why

The guest's channels, requests and devices are in the journal (:mod:`vmbus.machine.journal`), the devices' lines too.
A guest that moves has two QEMUs for a while; it is in the first one until that says that it has left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vmbus.errors import UserError
from vmbus.machine.host import ExitReason
from vmbus.machine.host_parts import HostOptions
from vmbus.machine.reload.description import options_values
from vmbus.machine.reload.link import ReloadEnded, ReloadFailed
from vmbus.machine.reload.worker import Worker

_logger = logging.getLogger(__name__)

IN_A_ROW = 10
"""Workers that may end one after the other within :data:`SHORT` seconds of their service."""
KILLED_IN_A_ROW = 100
"""The same for workers that are killed by SIGKILL: of what they have taken over they would die in another way."""
SHORT = 0.5
"""Seconds of service, measured from the take-over."""
_RECOVER_TIMEOUT = 180.0
"""Seconds in which a worker attaches: it waits until transfers of the one before have ended."""
_SERVING_TIMEOUT = 60.0
"""Seconds in which a new worker serves the guest, or ends, once the one that handed it over has ended."""


class SupervisedMachines(Protocol):
    """The QEMUs of a guest; :class:`~vmbus.machine.guest.Guest`, or one that an emulator was attached to."""

    def monitor(self) -> Path:
        """Return the QMP socket of the QEMU that has the guest."""

    def has_next(self) -> bool:
        """Return whether there is another one, for a guest that moves."""

    async def take_machine(self) -> None:
        """End the guest's QEMU: it has moved to the other one."""

    async def discard_machine(self) -> None:
        """End that one, if there is one."""

    async def ended(self) -> ExitReason | None:
        """Return why QEMU has ended, after a moment for one that is about to; ``None`` while it runs."""


class Supervisor:
    """Starts workers that recover the guest. ``listener``: the control socket's descriptor, which this closes."""

    def __init__(
        self,
        machines: SupervisedMachines,
        directory: Path,
        options: HostOptions,
        lines: Sequence[str],
        listener: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``lines``: of the devices, for a guest that is killed before its journal has them."""
        self._machines = machines
        self._directory = directory
        self._options = options
        self._lines = list(lines)
        self._listener = listener
        self._clock = clock
        self._began = clock()
        self._in_a_row = 0
        self.takeovers = 0

    async def serves(self, worker: Worker) -> bool:
        """Return whether a worker has taken the guest over from one that has ended meanwhile; otherwise end it."""
        try:
            await worker.keeper.hear("serving", timeout=_SERVING_TIMEOUT)
        except ReloadFailed:
            await worker.close()
            return False
        return True

    async def recover(self, ended: Worker, how: str) -> Worker | ExitReason:
        """Start the worker that goes on after one that ``ended``: ``how``, in words.

        Return why the service ended instead, if QEMU has ended, too, or the guest has left. Raises
        :class:`~vmbus.errors.UserError` for a guest that cannot be taken over.
        """
        self._died(ended, how)
        while True:
            begun = self._clock()
            worker = Worker.start(ended.program, supervised=True)
            try:
                found = await self._recovered(worker)
            except ReloadEnded:
                ended, how = worker, await worker.close()
                if (reason := await self._machines.ended()) is not None:
                    return reason
                self._died(ended, how)
                continue
            except ReloadFailed as error:
                await worker.close()
                if (reason := await self._machines.ended()) is not None:
                    return reason
                raise UserError(
                    f"the emulator of the guest ended unexpectedly ({how}), and the next one cannot go on: {error}"
                ) from error
            except BaseException:
                await worker.close()
                raise
            if not found:
                await worker.close()
                if not self._machines.has_next():
                    return ExitReason.MIGRATED
                await self._machines.take_machine()
                continue
            worker.link.close()
            await self._machines.discard_machine()
            self.takeovers += 1
            self._began = self._clock()
            _logger.warning(
                "process %d serves the guest now, %.0f ms later",
                worker.process.pid,
                (self._began - begun) * 1000,
            )
            return worker

    async def _recovered(self, worker: Worker) -> bool:
        """Have a worker recover the guest; return False for one that has left its QEMU."""
        await worker.link.tell(
            "recover",
            {
                "directory": str(self._directory),
                "monitor": str(self._machines.monitor()),
                "options": options_values(self._options),
                "devices": self._lines,
                "takeovers": self.takeovers + 1,
            },
            descriptors=[self._listener],
        )
        answer = await worker.link.hear("recovered", "left", timeout=_RECOVER_TIMEOUT)
        return answer.kind == "recovered"

    def _died(self, ended: Worker, how: str) -> None:
        """Count a death, and tell it. Raises :class:`~vmbus.errors.UserError` when too many came too soon."""
        limit = KILLED_IN_A_ROW if ended.process.returncode == -signal.SIGKILL else IN_A_ROW
        served = self._clock() - self._began
        self._in_a_row = self._in_a_row + 1 if served < SHORT else 1
        self._began = self._clock()
        if self._in_a_row > limit:
            raise UserError(
                f"{self._in_a_row} emulators of this guest ended one after the other, each within {SHORT:g} s, the "
                f"last one thus: {how}; the guest is given up. Their messages are above"
            )
        _logger.warning("the emulator ended unexpectedly (%s); the next one takes the guest over", how)

    def close(self) -> None:
        """Close the control socket's descriptor; safe to call twice."""
        if self._listener >= 0:
            os.close(self._listener)
            self._listener = -1


class AttachedMachine:
    """:class:`SupervisedMachines` of an emulator that was attached to a QEMU: it neither starts nor ends it."""

    def __init__(self, monitor: Path, pid: int) -> None:
        self._monitor = monitor
        self._pid = pid

    def monitor(self) -> Path:
        """Return its QMP socket."""
        return self._monitor

    def has_next(self) -> bool:
        """Return False: it does not start another one."""
        return False

    async def take_machine(self) -> None:
        """Do nothing: there is none."""

    async def discard_machine(self) -> None:
        """Do nothing: there is none."""

    async def ended(self) -> ExitReason | None:
        """Return whether QEMU has ended; nobody knows why, for it is not a child of this process."""
        return ExitReason.QEMU_GONE if await gone(lambda: not _runs(self._pid)) else None


_END_WAIT = 5.0
"""Seconds in which a QEMU that has closed its sockets has ended."""
_LOOK_EVERY = 0.05


async def gone(ended: Callable[[], bool]) -> bool:
    """Return whether a process has ended, after a moment for one that is about to."""
    until = asyncio.get_running_loop().time() + _END_WAIT
    while not ended():
        if asyncio.get_running_loop().time() > until:
            return False
        await asyncio.sleep(_LOOK_EVERY)
    return True


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
