"""Reloads, and who serves the guest meanwhile: this process, or one worker after the other.

                    ┌── reload ──┐                       ┌── reload ──┐
    this process serves ────→ worker serves, this process keeps ────→ next worker serves …
                                       └── ended: the reason ──→ this process ends as if it had served

A worker cannot start the next one itself: it would be the child of a process that ends. It asks its keeper::

    worker                                   keeper
    start: the program ────────────────────→ starts the next worker
            ←──────────────────────────────  started, with the descriptor of its link
    (hands the guest over)
    handed ────────────────────────────────→ follows the next worker
    or failed ─────────────────────────────→ waits until the next worker has ended
            ←──────────────────────────────  gone

Nor does it start or end QEMUs, which are to outlive it; for a move (:mod:`vmbus.machine.reload.moves`)::

    open ──────────────────────────────────→ starts a QEMU that waits for the guest
            ←──────────────────────────────  done, with its folder and QMP socket
    take, or discard ──────────────────────→ ends the other one, or that one
            ←──────────────────────────────  done

A supervised guest has a worker from the beginning. A worker that is killed is replaced
(:mod:`vmbus.machine.reload.supervisor`), and each says ``serving`` when it has the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vmbus.errors import UserError, VmbusError, system_reason
from vmbus.machine.host import ExitReason, Host
from vmbus.machine.migration.drive import MigrationFailed
from vmbus.machine.reload.link import Link, Received, ReloadEnded, ReloadFailed
from vmbus.machine.reload.predecessor import hand_over
from vmbus.machine.reload.supervisor import SupervisedMachines, Supervisor
from vmbus.machine.reload.worker import Worker, named_program, own_program
from vmbus.machine.rundir import RunDirectory

_logger = logging.getLogger(__name__)


class Serving(Protocol):
    """The service of a guest by this process; :class:`~vmbus.machine.served.Served`."""

    directory: Path
    host: Host
    machines: Machines | None
    """Who starts and ends QEMUs for this guest; ``None``: not this process."""

    def hold(self) -> None:
        """Accept no more commands until :meth:`accept` or :meth:`leave`."""

    async def accept(self) -> None:
        """Accept commands again."""

    def listener(self) -> int:
        """Return the descriptor of the control socket."""

    def leave(self) -> None:
        """End the service: another process has taken the guest over."""


class Machines(Protocol):
    """The QEMUs of a guest; :class:`~vmbus.machine.guest.Guest`."""

    async def open_machine(self, *, share_memory: bool) -> RunDirectory:
        """Start a QEMU that waits for the guest, and has no host yet; return its folder."""

    async def take_machine(self) -> None:
        """End the guest's QEMU: it has moved to that one."""

    async def discard_machine(self) -> None:
        """End that one."""


async def _hand_over(
    served: Serving, link: Link, ended: Callable[[], Awaitable[str]], program: str
) -> dict[str, Any]:
    served.hold()
    try:
        seconds = await hand_over(
            served.host, link, ended, {"directory": str(served.directory)}, [served.listener()]
        )
    except BaseException:
        await served.accept()
        raise
    served.leave()
    return {"still": seconds, "program": program}


def _program(request: Mapping[str, Any]) -> list[str]:
    path = request.get("emulator")
    return named_program(Path(str(path))) if path is not None else own_program()


_OF_MACHINES = ("open", "take", "discard")
_NO_MACHINES = (
    "the emulator did not start this guest's QEMU, so it cannot start a second one like it: start one with -incoming "
    "defer, attach an emulator to it, and say where it listens (vmbus migrate NAME URI)"
)


class Keeper:
    """Keeps a guest whose emulator may be replaced; for the process that the user started."""

    def __init__(self, served: Serving) -> None:
        self._served = served
        self._worker: Worker | None = None
        self._next: Worker | None = None
        self._supervisor: Supervisor | None = None
        self._asked_to_end = False

    @property
    def follows(self) -> bool:
        """Whether a worker serves the guest."""
        return self._worker is not None

    async def reload(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer ``reload`` while this process serves the guest."""
        program = _program(request)
        worker = Worker.start(program, supervised=self._supervisor is not None)
        try:
            found = await _hand_over(self._served, worker.link, worker.close, program[0])
        except BaseException:
            await worker.close()
            raise
        self._worker = worker
        return {**found, "pid": worker.process.pid}

    async def supervise(self, machines: SupervisedMachines) -> None:
        """Let a worker serve the guest, and replace it whenever it is killed.

        Raises :class:`~vmbus.machine.reload.link.ReloadFailed`: then this process serves the guest, as before.
        """
        host = self._served.host
        self._supervisor = Supervisor(
            machines,
            self._served.directory,
            host.options,
            [line for attached in host.devices for line in attached.device.lines()],
            os.dup(self._served.listener()),
        )
        try:
            await self.reload({})
        except BaseException:
            self._supervisor.close()
            self._supervisor = None
            raise

    async def exit_reason(self) -> ExitReason:
        """Follow the workers; return why the service of the guest ended.

        Raises :class:`~vmbus.errors.UserError` when one ends without a word.
        """
        reason: ExitReason | None = None
        while True:
            worker = self._worker
            if worker is None:
                raise UserError("no emulator serves the guest")
            try:
                message = await worker.keeper.hear(
                    "start", "handed", "failed", "ended", "serving", *_OF_MACHINES, timeout=None
                )
            except ReloadEnded:
                how = await worker.ended()
                if reason is not None:
                    return reason
                await worker.close()
                if (reason := await self._replace(worker, how)) is not None:
                    return reason
                continue
            if message.kind == "start":
                await self._start_next(worker, message.values)
            elif message.kind in _OF_MACHINES:
                await self._do(worker, message)
            elif message.kind == "failed":
                await self._answer(worker, "gone", {"how": await self._end_next()})
            elif message.kind == "ended":  # a reload under way is given up, which it may still report
                reason = ExitReason(message.values["reason"])
            elif message.kind == "handed" and self._next is not None:
                self._worker, self._next = self._next, None
                await worker.close()

    async def _replace(self, worker: Worker, how: str) -> ExitReason | None:
        """Follow another worker after one that ended without a word; return why the service ended if there is none.

        Raises :class:`~vmbus.errors.UserError`.
        """
        following, self._next = self._next, None
        if self._supervisor is None:
            self._next = following
            raise UserError(f"the emulator of the guest ended unexpectedly: {how}")
        if following is not None and await self._supervisor.serves(following):
            self._worker = following
        elif self._asked_to_end:
            return ExitReason.STOPPED
        else:
            found = await self._supervisor.recover(worker, how)
            if isinstance(found, ExitReason):
                return found
            self._worker = found
        if self._asked_to_end:  # meanwhile
            self._worker.tell_to_end()
        return None

    @staticmethod
    async def _answer(
        worker: Worker, kind: str, values: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> None:
        """Answer a worker; the end of one that has ended meanwhile is heard after what it said before."""
        with contextlib.suppress(ReloadEnded):
            await worker.keeper.tell(kind, values, descriptors=descriptors)

    async def _do(self, worker: Worker, message: Received) -> None:
        """Start or end a QEMU for a worker; whatever fails is refused: the guest is served on."""
        machines, found = self._served.machines, {}
        try:
            if machines is None:
                raise MigrationFailed(_NO_MACHINES)
            if message.kind == "open":
                directory = await machines.open_machine(share_memory=message.values["share_memory"] is True)
                found = {"folder": str(directory.path), "monitor": str(directory.qmp)}
            elif message.kind == "take":
                await machines.take_machine()
            else:
                await machines.discard_machine()
        except VmbusError as error:
            await worker.keeper.refuse(str(error))
        except OSError as error:
            await worker.keeper.refuse(system_reason(error))
        except Exception as error:
            _logger.exception("internal error during a move of the guest; please report this")
            await worker.keeper.refuse(f"internal error in the process that keeps the guest ({error!r})")
        else:
            await self._answer(worker, "done", found)

    async def _end_next(self) -> str:
        following, self._next = self._next, None
        return "" if following is None else await following.close()

    async def _start_next(self, worker: Worker, request: Mapping[str, Any]) -> None:
        try:
            self._next = following = Worker.start(_program(request), supervised=self._supervisor is not None)
            await self._answer(worker, "started", {"pid": following.process.pid}, [following.link.fileno()])
        except ReloadFailed as error:
            await self._end_next()
            await worker.keeper.refuse(str(error))
        else:
            following.link.close()

    def tell_to_end(self) -> None:
        """Have the worker end its service."""
        self._asked_to_end = True
        if self._worker is not None:
            self._worker.tell_to_end()

    async def close(self) -> None:
        """End the workers."""
        for worker in (self._worker, self._next):
            if worker is not None:
                await worker.close()
        if self._supervisor is not None:
            self._supervisor.close()


class Kept:
    """Reloads of a worker, whose keeper is at ``keeper``."""

    def __init__(self, served: Serving, keeper: Link) -> None:
        self._served = served
        self._keeper = keeper
        self._conversation = asyncio.Lock()
        """One question at a time."""
        self.handed = False
        """Whether another worker has the guest."""

    async def reload(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer ``reload`` while this worker serves the guest."""
        program = _program(request)[0]
        how: str | None = None

        async def gone() -> str:
            nonlocal how
            if how is None:
                how = str((await self._ask("failed", {}, "gone")).values["how"])
            return how

        link: Link | None = None
        try:
            started = await self._ask("start", {"emulator": request.get("emulator")}, "started")
            pid = int(started.values["pid"])
            link = Link(_received(started.descriptors), f"the new emulator (process {pid})")
            found = await _hand_over(self._served, link, gone, program)
        except BaseException:
            if link is not None:
                link.close()
            await gone()
            raise
        self.handed = True
        await self._keeper.tell("handed")
        return {**found, "pid": pid}

    async def _ask(self, kind: str, values: Mapping[str, Any], answer: str) -> Received:
        async with self._conversation:
            await self._keeper.tell(kind, values)
            return await self._keeper.hear(answer, timeout=None)

    async def open_machine(self, *, share_memory: bool) -> tuple[Path, Path]:
        """Have the keeper start a QEMU that waits for the guest; return its folder and its QMP socket."""
        found = await self._ask_for_machine("open", {"share_memory": share_memory})
        return Path(found["folder"]), Path(found["monitor"])

    async def take_machine(self) -> None:
        """Have it end the guest's QEMU: it has moved to that one."""
        await self._ask_for_machine("take", {})

    async def discard_machine(self) -> None:
        """Have it end that one."""
        await self._ask_for_machine("discard", {})

    async def _ask_for_machine(self, kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return (await self._ask(kind, values, "done")).values
        except ReloadFailed as error:
            raise MigrationFailed(str(error)) from error

    async def tell_end(self, reason: ExitReason) -> None:
        """Tell the keeper why the service ended, unless another worker goes on."""
        if not self.handed:
            with contextlib.suppress(ReloadFailed):  # it has ended, too
                await self._keeper.tell("ended", {"reason": reason.value})


def _received(descriptors: Sequence[int]) -> socket.socket:
    if len(descriptors) != 1:
        for number in descriptors:
            os.close(number)
        raise ReloadFailed(f"{len(descriptors)} descriptors came with a new emulator, 1 was expected")
    return socket.socket(fileno=descriptors[0])
