"""The base of the integration components: framing, negotiation, one request at a time.

Source: docs/protocol/devices.md#integration-component-framing,
docs/protocol/devices.md#integration-component-negotiation. The guest never speaks first here: the host negotiates
versions when the channel opens, then asks, and the guest answers each request once, with its IC transaction id.

    | state       | event                          | then                                               |
    | CLOSED      | guest opens                    | NEGOTIATING; the lists of versions go out          |
    | NEGOTIATING | answer with one of each list   | READY, ``ready()``                                 |
    | NEGOTIATING | answer with none               | UNSUPPORTED                                        |
    | NEGOTIATING | an answer to something else    | stale (from before a restore): dropped             |
    | READY       | answer to the pending request  | ``answered()``                                     |
    | READY       | damaged answer                 | refused; ``unanswered()``                          |
    | READY       | no answer in time              | ``overdue()``; the request stays pending           |
    | READY       | answer with another id         | stale: dropped                                     |
    | any         | guest closes                   | CLOSED, ``disconnected()``                         |

Refusals are counted by the channel, under these reasons:

    | reason               | found                                                                          |
    | ic-unexpected-packet | a packet that is not in band                                                   |
    | ic-short             | no room for the headers, or lengths that contradict each other                 |
    | ic-pipe-type         | a pipe packet that is no data                                                  |
    | ic-not-a-transaction | the transaction flag is missing                                                |
    | ic-not-an-answer     | the response flag is missing, or the request flag is set                       |
    | ic-stale-answer      | the answer to no request, or not to the pending one                            |
    | ic-wrong-type        | the id of the pending request, the type of another component                   |
    | ic-bad-version       | a version that was not offered, or an impossible number of them                |
    | ic-short-body        | a body shorter than the message type's minimum                                 |
"""

from __future__ import annotations

import abc
import enum
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import construct as c
from vmbus.api import (
    Channel,
    Device,
    DeviceError,
    GuestError,
    InternalError,
    Offer,
    OfferFlags,
    Packet,
    PacketType,
    PipeMode,
    Record,
    SavedState,
    TimerHandle,
    pipe_area,
)
from vmbus.wire.ic import (
    BODY_OFFSET,
    FRAMEWORK_VERSIONS,
    IC_HEADER_SIZE,
    NEGOTIATE_ANSWER,
    NEGOTIATE_OFFER,
    IcFlags,
    IcHeader,
    IcMessageType,
    IcStatus,
    IcVersion,
    NegotiateOffer,
    build_message,
    parse_message,
)
from vmbus.wire.pipe import PIPE_HEADER, PipeType

_logger = logging.getLogger(__name__)

NEGOTIATION_TIMEOUT = 30.0
"""Seconds without an answer after which the log says so. The offer is not sent again: it stays in the ring, and a
guest whose service starts late answers it late (docs/protocol/devices.md#time-limits-of-linux)."""


class IcState(enum.Enum):
    """States of the table above."""

    CLOSED = "closed"
    NEGOTIATING = "negotiating"
    READY = "ready"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class IcSaved:
    """What every component keeps over a restore. ``pending`` is 0 or 1; versions are 0 unless it was ready."""

    ready: int
    framework_major: int
    framework_minor: int
    message_major: int
    message_minor: int
    next_transaction: int
    pending: int
    pending_transaction: int


IC_SAVED = SavedState(
    Record(
        IcSaved,
        "ready" / c.Int8ul,
        "framework_major" / c.Int16ul,
        "framework_minor" / c.Int16ul,
        "message_major" / c.Int16ul,
        "message_minor" / c.Int16ul,
        "next_transaction" / c.Int8ul,
        "pending" / c.Int8ul,
        "pending_transaction" / c.Int8ul,
    )
)
IC_SAVED_BYTES = IC_SAVED.size


class IntegrationComponent(Device):
    """One integration component. A subclass defines its identity, its versions, and what it does when ready."""

    interface_id: ClassVar[uuid.UUID]
    instance_id: ClassVar[uuid.UUID]
    message_type: ClassVar[IcMessageType]
    message_versions: tuple[IcVersion, ...]
    """The versions that are offered, lowest first. Read when the channel opens."""
    min_body: ClassVar[int] = 0
    """Bytes of body that an answer must have at least."""

    def __init__(self) -> None:
        self.state = IcState.CLOSED
        self.framework: IcVersion | None = None
        """The agreed version of the framing; ``None`` unless ready."""
        self.version: IcVersion | None = None
        """The agreed version of the component's own messages; ``None`` unless ready."""
        self._io: Channel | None = None
        self._pending: int | None = None
        self._next_transaction = 1
        self._timer: TimerHandle | None = None

    # --- for subclasses ---

    @abc.abstractmethod
    def ready(self) -> None:
        """Called when the versions are negotiated: requests may be sent from now on."""

    @abc.abstractmethod
    def answered(self, header: IcHeader, body: bytes) -> None:
        """Called with the answer to the pending request; its body has at least ``min_body`` bytes if status is 0."""

    def unanswered(self) -> None:
        """Called when the answer was refused; no request is pending any more."""

    def overdue(self) -> None:
        """Called when the timeout of :meth:`request` has passed. The answer may still come."""

    def disconnected(self, pending: bool) -> None:
        """Called when the guest closed the channel; ``pending``: a request had no answer yet."""

    @property
    def pending(self) -> bool:
        """Whether a request has no answer yet."""
        return self.state is IcState.READY and self._pending is not None

    @property
    def connected(self) -> bool:
        """Whether the channel is open and has not failed, here or before a restore: requests reach the guest."""
        return self._io is not None and not self._io.failure

    def request(self, body: bytes, *, timeout: float | None = None) -> None:
        """Send a request; ``overdue`` is called after ``timeout`` seconds without an answer.

        Guests take one request at a time. Raises :class:`~vmbus.errors.InternalError` while one is pending,
        or when the component is not ready.
        """
        if self.state is not IcState.READY or self._pending is not None:
            raise InternalError(
                f"{self.name}: a request in state {self.state.value}, with request {self._pending} pending"
            )
        transaction = self._next_transaction
        self._next_transaction = (transaction + 1) % 256
        self._send(self.message_type, transaction, body)
        self._pending = transaction
        if timeout is not None:
            self.expect(timeout)

    def expect(self, timeout: float) -> None:
        """Have ``overdue`` called if the pending request has no answer within ``timeout`` seconds."""
        self._after(timeout, self.overdue)

    def abandon(self) -> None:
        """Drop the pending request: an answer that still comes is stale."""
        self._pending = None
        self._cancel()

    # --- Device ---

    def offer(self) -> Offer:
        """Return the offer of a channel in message mode, as Hyper-V offers its integration components."""
        return Offer(
            interface_id=self.interface_id,
            instance_id=self.instance_id,
            flags=OfferFlags.ENUMERATE_DEVICE_INTERFACE | OfferFlags.NAMED_PIPE_MODE,
            user_defined=pipe_area(PipeMode.MESSAGE),
            name=self.name,
        )

    def opened(self, io: Channel) -> None:
        """Start to negotiate."""
        self._io = io
        self._negotiate()

    def restored(self, io: Channel) -> None:
        """Continue where the saved component was; negotiate if the negotiation had not ended."""
        self._io = io
        if self.state is IcState.READY:
            self.ready_again()
        else:
            self._negotiate()

    def ready_again(self) -> None:
        """Called in place of :meth:`ready` after a restore that kept the negotiated versions."""
        self.ready()

    def closed(self, io: Channel) -> None:
        """Clear what was negotiated."""
        self._cancel()
        pending = self.pending
        self.state = IcState.CLOSED
        self.framework = self.version = None
        self._io = None
        self._pending = None
        self._next_transaction = 1
        self.disconnected(pending)

    def stop(self) -> None:
        """Cancel the timer."""
        self._cancel()

    def packet(self, io: Channel, packet: Packet) -> None:
        """Take an answer of the guest."""
        if packet.kind is not PacketType.IN_BAND:
            raise GuestError("ic-unexpected-packet", f"type {packet.kind}")
        header, body = _parse(packet.payload)
        _check_flags(header)
        if header.message_type == IcMessageType.NEGOTIATE and self.state is IcState.NEGOTIATING:
            self._negotiated(body)
        else:
            self._take_answer(header, body)
        if packet.completion_requested:  # no known guest requests one
            io.complete(packet.transaction_id)

    def status(self) -> dict[str, Any]:
        """Return state and versions."""
        report: dict[str, Any] = {"state": self.state.value}
        if self.version is not None:
            report |= {"framework": str(self.framework), "version": str(self.version)}
        return report

    # --- saving ---

    def save(self) -> bytes:
        """Return versions, and the pending transaction. Subclasses append their own record."""
        none = IcVersion(0, 0)
        framework, version = self.framework or none, self.version or none
        return IC_SAVED.save(
            IcSaved(
                ready=int(self.state is IcState.READY),
                framework_major=framework.major,
                framework_minor=framework.minor,
                message_major=version.major,
                message_minor=version.minor,
                next_transaction=self._next_transaction,
                pending=int(self._pending is not None),
                pending_transaction=self._pending or 0,
            )
        )

    def restore(self, state: bytes) -> None:
        """The inverse of :meth:`save`. Raises :class:`~vmbus.errors.DeviceError`."""
        saved = IC_SAVED.load(state, self.name)
        framework = IcVersion(saved.framework_major, saved.framework_minor)
        version = IcVersion(saved.message_major, saved.message_minor)
        if saved.ready > 1 or saved.pending > 1:
            raise DeviceError(f"{self.name}: saved state is damaged")
        self._next_transaction = saved.next_transaction
        if not saved.ready:
            return
        if framework not in FRAMEWORK_VERSIONS or version not in self.message_versions:
            raise DeviceError(
                f"{self.name}: versions {framework} and {version} were negotiated, but are not offered here"
            )
        self.state, self.framework, self.version = IcState.READY, framework, version
        self._pending = saved.pending_transaction if saved.pending else None

    # --- private ---

    def _negotiate(self) -> None:
        self.state = IcState.NEGOTIATING
        self.framework = self.version = None
        self._pending = None
        offer = NegotiateOffer(FRAMEWORK_VERSIONS, self.message_versions)
        self._send(IcMessageType.NEGOTIATE, 0, NEGOTIATE_OFFER.build(offer))
        self._after(NEGOTIATION_TIMEOUT, self._still_negotiating)

    def _still_negotiating(self) -> None:
        _logger.info("%s: the guest has not answered the offer of versions yet", self.name)

    def _negotiated(self, body: bytes) -> None:
        if len(body) < NEGOTIATE_ANSWER.size:
            raise GuestError("ic-short-body", f"{len(body)} bytes of negotiation")
        answer = NEGOTIATE_ANSWER.parse(body)
        self._cancel()
        counts = (answer.framework_count, answer.message_count)
        if counts == (0, 0):
            self.state = IcState.UNSUPPORTED
            _logger.warning(
                "%s: the guest supports none of the versions %s",
                self.name,
                ", ".join(map(str, self.message_versions)),
            )
            return
        if (
            counts != (1, 1)
            or answer.framework not in FRAMEWORK_VERSIONS
            or answer.message not in self.message_versions
        ):
            self.state = IcState.UNSUPPORTED
            raise GuestError(
                "ic-bad-version",
                f"{counts[0]} framework and {counts[1]} message versions, {answer.framework} and {answer.message}",
            )
        self.state, self.framework, self.version = IcState.READY, answer.framework, answer.message
        self.ready()

    def _take_answer(self, header: IcHeader, body: bytes) -> None:
        if self.state is not IcState.READY or self._pending != header.transaction_id:
            raise GuestError("ic-stale-answer", f"transaction {header.transaction_id} while {self._pending}")
        if header.message_type == IcMessageType.NEGOTIATE:
            raise GuestError("ic-stale-answer", "a negotiation that has ended")
        self._pending = None
        self._cancel()
        if header.message_type != self.message_type:
            self.unanswered()
            raise GuestError("ic-wrong-type", f"{header.message_type}")
        if header.status == IcStatus.OK and len(body) < self.min_body:
            self.unanswered()
            raise GuestError("ic-short-body", f"{len(body)} bytes, at least {self.min_body}")
        self.answered(header, body)

    def _send(self, message_type: IcMessageType, transaction: int, body: bytes) -> None:
        if self._io is None:
            raise InternalError(f"{self.name}: a message while the channel is closed")
        none = IcVersion(0, 0)
        header = IcHeader(
            framework=self.framework or none,
            message_type=message_type,
            message_version=self.version or none,
            size=len(body),
            status=IcStatus.OK,
            transaction_id=transaction,
            flags=IcFlags.TRANSACTION | IcFlags.REQUEST,
        )
        self._io.send(build_message(header, body))

    def _after(self, seconds: float, callback: Callable[[], None]) -> None:
        self._cancel()
        self._timer = self.environment.timers.call_later(seconds, callback)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _parse(payload: bytes) -> tuple[IcHeader, bytes]:
    """Return header and body of an answer; the payload is padded to 8 bytes."""
    if len(payload) < BODY_OFFSET:
        raise GuestError("ic-short", f"{len(payload)} bytes")
    pipe, header = parse_message(payload)
    if pipe.type != PipeType.DATA:
        raise GuestError("ic-pipe-type", f"{pipe.type}")
    end = PIPE_HEADER.size + pipe.length
    if pipe.length < IC_HEADER_SIZE or end > len(payload) or BODY_OFFSET + header.size > end:
        raise GuestError(
            "ic-short", f"body of {header.size} in a pipe packet of {pipe.length} in {len(payload)} bytes"
        )
    return header, payload[BODY_OFFSET : BODY_OFFSET + header.size]


def _check_flags(header: IcHeader) -> None:
    if not header.flags & IcFlags.TRANSACTION:
        raise GuestError("ic-not-a-transaction", f"flags {header.flags:#x}")
    if not header.flags & IcFlags.RESPONSE or header.flags & IcFlags.REQUEST:
        raise GuestError("ic-not-an-answer", f"flags {header.flags:#x}")
