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
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vmbus.errors import UserError
from vmbus.machine.host import ExitReason, Host
from vmbus.machine.reload.link import Link, ReloadEnded, ReloadFailed
from vmbus.machine.reload.predecessor import hand_over
from vmbus.machine.reload.worker import Worker, named_program, own_program


class Serving(Protocol):
    """The service of a guest by this process; :class:`~vmbus.machine.served.Served`."""

    directory: Path
    host: Host

    def hold(self) -> None:
        """Accept no more commands until :meth:`accept` or :meth:`leave`."""

    async def accept(self) -> None:
        """Accept commands again."""

    def listener(self) -> int:
        """Return the descriptor of the control socket."""

    def leave(self) -> None:
        """End the service: another process has taken the guest over."""


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


class Keeper:
    """Keeps a guest whose emulator may be replaced; for the process that the user started."""

    def __init__(self, served: Serving) -> None:
        self._served = served
        self._worker: Worker | None = None
        self._next: Worker | None = None

    @property
    def follows(self) -> bool:
        """Whether a worker serves the guest."""
        return self._worker is not None

    async def reload(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer ``reload`` while this process serves the guest."""
        program = _program(request)
        worker = Worker.start(program)
        try:
            found = await _hand_over(self._served, worker.link, worker.close, program[0])
        except BaseException:
            await worker.close()
            raise
        self._worker = worker
        return {**found, "pid": worker.process.pid}

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
                message = await worker.keeper.hear("start", "handed", "failed", "ended", timeout=None)
            except ReloadEnded:
                how = await worker.ended()
                if reason is not None:
                    return reason
                raise UserError(f"the emulator of the guest ended unexpectedly: {how}") from None
            if message.kind == "start":
                await self._start_next(worker, message.values)
            elif message.kind == "failed":
                await worker.keeper.tell("gone", {"how": await self._end_next()})
            elif message.kind == "ended":  # a reload under way is given up, which it may still report
                reason = ExitReason(message.values["reason"])
            elif self._next is not None:
                self._worker, self._next = self._next, None
                await worker.close()

    async def _end_next(self) -> str:
        following, self._next = self._next, None
        return "" if following is None else await following.close()

    async def _start_next(self, worker: Worker, request: Mapping[str, Any]) -> None:
        try:
            self._next = following = Worker.start(_program(request))
        except ReloadFailed as error:
            await worker.keeper.refuse(str(error))
            return
        await worker.keeper.tell(
            "started", {"pid": following.process.pid}, descriptors=[following.link.fileno()]
        )
        following.link.close()

    def tell_to_end(self) -> None:
        """Have the worker end its service."""
        if self._worker is not None:
            self._worker.tell_to_end()

    async def close(self) -> None:
        """End the workers."""
        for worker in (self._worker, self._next):
            if worker is not None:
                await worker.close()


class Kept:
    """Reloads of a worker, whose keeper is at ``keeper``."""

    def __init__(self, served: Serving, keeper: Link) -> None:
        self._served = served
        self._keeper = keeper
        self.handed = False
        """Whether another worker has the guest."""

    async def reload(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer ``reload`` while this worker serves the guest."""
        await self._keeper.tell("start", {"emulator": request.get("emulator")})
        started = await self._keeper.hear("started")
        link = Link(_received(started.descriptors), f"the new emulator (process {started.values['pid']})")
        program = _program(request)[0]

        how: str | None = None

        async def gone() -> str:
            nonlocal how
            if how is None:
                await self._keeper.tell("failed")
                how = str((await self._keeper.hear("gone", timeout=None)).values["how"])
            return how

        try:
            found = await _hand_over(self._served, link, gone, program)
        except BaseException:
            link.close()
            await gone()
            raise
        self.handed = True
        await self._keeper.tell("handed")
        return {**found, "pid": started.values["pid"]}

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
