"""Shutdown: asks the guest to power off, restart or hibernate.

Source: docs/protocol/devices.md#shutdown. The guest answers "ok" before it acts, so the answer announces an
intention. QEMU reports the end of the machine.

    | outcome     | means                                                                           |
    | OK          | the guest will do it                                                            |
    | FAILED      | the guest refuses; ``status`` says why (hibernation without S4, ...)            |
    | NOT_READY   | nothing was sent: no driver in the guest has opened the channel and negotiated, |
    |             | or the channel has failed                                                       |
    | IN_PROGRESS | nothing was sent: another request has no answer yet                             |
    | NO_ANSWER   | the guest has not answered in time                                              |
    | GONE        | the guest closed the channel before it answered                                 |
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import construct as c
from vmbus.api import ControlCommand, Record, SavedState, UsageError
from vmbus.wire.ic import (
    SHUTDOWN_BODY,
    SHUTDOWN_INSTANCE,
    SHUTDOWN_INTERFACE,
    SHUTDOWN_MESSAGE_BYTES,
    SHUTDOWN_REASON_PLANNED,
    IcHeader,
    IcMessageType,
    IcStatus,
    IcVersion,
    ShutdownBody,
    ShutdownFlags,
)

from vmbus_devices.ic import IC_SAVED_BYTES, IntegrationComponent

_logger = logging.getLogger(__name__)

ANSWER_TIMEOUT = 30.0
"""Seconds for an answer. Guests answer before they act, so only a guest that hangs needs longer."""


class ShutdownAction(enum.Enum):
    """What is requested of the guest."""

    SHUTDOWN = "shutdown"
    RESTART = "restart"
    HIBERNATE = "hibernate"


_ACTION_FLAGS = {
    ShutdownAction.SHUTDOWN: ShutdownFlags(0),
    ShutdownAction.RESTART: ShutdownFlags.RESTART,
    ShutdownAction.HIBERNATE: ShutdownFlags.HIBERNATE,
}


class ShutdownOutcome(enum.Enum):
    """The end of a request; see the table above."""

    OK = "ok"
    FAILED = "failed"
    NOT_READY = "not ready"
    IN_PROGRESS = "in progress"
    NO_ANSWER = "no answer"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class ShutdownResult:
    """``status`` is the guest's, 0 unless the outcome is ``FAILED``."""

    outcome: ShutdownOutcome
    status: int = 0

    def __str__(self) -> str:
        if self.outcome is not ShutdownOutcome.FAILED:
            return str(self.outcome.value)
        try:
            return f"failed: {IcStatus(self.status).name.lower().replace('_', ' ')} ({self.status:#010x})"
        except ValueError:
            return f"failed: {self.status:#010x}"


Done = Callable[[ShutdownResult], None]


@dataclass(frozen=True, slots=True)
class ShutdownSaved:
    """What shutdown keeps over a restore. The caller of a request cannot be kept; its result is logged."""

    requests: int


SHUTDOWN_SAVED = SavedState(Record(ShutdownSaved, "requests" / c.Int64ul))


class Shutdown(IntegrationComponent):
    """Asks the guest to power off, restart or hibernate."""

    name = "shutdown"
    interface_id = SHUTDOWN_INTERFACE
    instance_id = SHUTDOWN_INSTANCE
    message_type = IcMessageType.SHUTDOWN
    message_versions = (IcVersion(1, 0), IcVersion(3, 0), IcVersion(3, 1), IcVersion(3, 2))

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0
        self.last_result: ShutdownResult | None = None
        self._done: Done | None = None

    def shut_down(
        self,
        action: ShutdownAction | str,
        done: Done | None = None,
        *,
        force: bool = False,
        reason: int = SHUTDOWN_REASON_PLANNED,
        timeout: int = 0,
        message: str = "",
    ) -> None:
        """Ask the guest. ``done`` is called exactly once, perhaps before this returns.

        ``force``: the guest shall not wait for its programs. ``timeout`` (seconds) and ``message`` are for the
        guest's users; Linux ignores both. Raises :class:`~vmbus.errors.UsageError` for an action that
        does not exist, or a message or number that does not fit; ``done`` is not called then.
        """
        body = _body(action, force, reason, timeout, message)
        if self.pending:
            _finish(done, ShutdownResult(ShutdownOutcome.IN_PROGRESS))
        elif self.version is None or not self.connected:
            _finish(done, ShutdownResult(ShutdownOutcome.NOT_READY))
        else:
            self.requests += 1
            self._done = done
            self.request(body, timeout=ANSWER_TIMEOUT)

    async def ask(self, action: ShutdownAction | str, **details: Any) -> ShutdownResult:
        """:meth:`shut_down` for coroutines."""
        answer: asyncio.Future[ShutdownResult] = asyncio.get_running_loop().create_future()

        def done(result: ShutdownResult) -> None:
            if not answer.done():  # the waiter may have been cancelled
                answer.set_result(result)

        self.shut_down(action, done, **details)
        return await answer

    def control_commands(self) -> Mapping[str, ControlCommand]:
        """Return ``shutdown``, which `vmbus shutdown` sends."""
        return {"shutdown": self._shutdown_command}

    async def _shutdown_command(self, request: Mapping[str, Any]) -> dict[str, Any]:
        action, force = str(request.get("action", "shutdown")), bool(request.get("force", False))
        result = await self.ask(action, force=force)
        return {"result": str(result), "agreed": result.outcome is ShutdownOutcome.OK}

    def ready(self) -> None:
        """Wait for a request."""

    def ready_again(self) -> None:
        """Continue to wait for the answer to a pending request after a restore."""
        if self.pending:
            self.expect(ANSWER_TIMEOUT)

    def answered(self, header: IcHeader, body: bytes) -> None:
        """End the request with the guest's status."""
        if header.status == IcStatus.OK:
            self._end(ShutdownResult(ShutdownOutcome.OK))
        else:
            self._end(ShutdownResult(ShutdownOutcome.FAILED, header.status))

    def unanswered(self) -> None:
        """End the request: its answer was refused."""
        self._end(ShutdownResult(ShutdownOutcome.NO_ANSWER))

    def overdue(self) -> None:
        """End the request, so that another one may be made."""
        self.abandon()
        self._end(ShutdownResult(ShutdownOutcome.NO_ANSWER))

    def disconnected(self, pending: bool) -> None:
        """End the request: the guest closed the channel, perhaps as part of its shutdown."""
        if pending:
            self._end(ShutdownResult(ShutdownOutcome.GONE))

    def status(self) -> dict[str, Any]:
        """Return the state, and the last result."""
        report = super().status() | {"requests": self.requests, "pending": self.pending}
        if self.last_result is not None:
            report["last_result"] = str(self.last_result)
        return report

    def save(self) -> bytes:
        """Return versions, and whether a request is pending."""
        return super().save() + SHUTDOWN_SAVED.save(ShutdownSaved(self.requests))

    def restore(self, state: bytes) -> None:
        """Restore what :meth:`save` returned."""
        own = SHUTDOWN_SAVED.load(state[IC_SAVED_BYTES:], self.name)
        super().restore(state[:IC_SAVED_BYTES])
        self.requests = own.requests

    def _end(self, result: ShutdownResult) -> None:
        _logger.info("%s: %s", self.name, result)
        self.last_result = result
        done, self._done = self._done, None
        _finish(done, result)


def _finish(done: Done | None, result: ShutdownResult) -> None:
    if done is not None:
        done(result)


def _body(action: ShutdownAction | str, force: bool, reason: int, timeout: int, message: str) -> bytes:
    try:
        flags = _ACTION_FLAGS[ShutdownAction(action)]
    except ValueError as error:
        allowed = ", ".join(each.value for each in ShutdownAction)
        raise UsageError(f"{action!r}: not one of {allowed}") from error
    if force:
        flags |= ShutdownFlags.FORCE
    text = message.encode("utf-16-le", errors="replace")
    if len(text) > SHUTDOWN_MESSAGE_BYTES - 2:
        limit = SHUTDOWN_MESSAGE_BYTES // 2 - 1
        raise UsageError(f"the message has {len(message)} characters; at most {limit} are possible")
    if not (0 <= reason <= 0xFFFF_FFFF and 0 <= timeout <= 0xFFFF_FFFF):
        raise UsageError(f"reason {reason:#x}, timeout {timeout}: each must fit into 32 bits")
    return SHUTDOWN_BODY.build(
        ShutdownBody(reason, timeout, int(flags), text.ljust(SHUTDOWN_MESSAGE_BYTES, b"\0"))
    )
