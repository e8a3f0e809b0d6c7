"""Hypercalls: registers, checks, and the two calls that VMBus uses (HvPostMessage, HvSignalEvent).

Source: docs/protocol/discovery.md#hypercalls.

Where TLFS, OpenVMM and QEMU differ, the status follows TLFS, then OpenVMM:

    call            situation                                         status
    --------------  ------------------------------------------------  ------------------------------
    any             code not known (all extended ones, 0x8001 on)     2  invalid hypercall code
    simple          reserved bits, nested bit, variable header, reps  3  invalid hypercall input
    simple, slow    input address not a multiple of 8                 4  invalid alignment
    simple, slow    input crosses a page, or is not RAM               3  invalid hypercall input
    HvPostMessage   fast                                              3  (OpenVMM; QEMU 2)
                    not offered                                       6  access denied
                    more than 240 bytes                               5  (TLFS, OpenVMM; QEMU 3)
                    message type 0, or with bit 31                    5  (TLFS; QEMU 3)
                    unknown connection                                0x12
                    refused by the message port                       the port's status (0x13: full)
    HvSignalEvent   not offered                                       6  access denied
                    reserved bits of the input                        3  (QEMU)
                    unknown connection                                0x12
                    flag number other than 0                          5  (TLFS; QEMU 0x11)

The order of the rows is the order of the checks. HvNotifyLongSpinWait is a hint and succeeds. XMM registers are
ignored: fast calls of more than 16 bytes of input are not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vmbus.errors import GuestAddressError, GuestError
from vmbus.hypervisor.features import Features
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.refusals import Refusals
from vmbus.wire.gateway import DoorbellRule, PostRule
from vmbus.wire.hypercall import (
    CONNECTION_ID_MASK,
    CONTROL,
    MESSAGE_PAYLOAD_MAX,
    POST_MESSAGE_STRUCT,
    SIGNAL_EVENT_STRUCT,
    CallCode,
    Control,
    HvStatus,
)


class UndefinedOpcode(GuestError):
    """#UD, to be injected into the guest: a hypercall while the hypercall page is not enabled.

    :class:`~vmbus.hypervisor.partition.Partition` counts it by ``reason`` before it leaves the partition.
    """


@dataclass(frozen=True, slots=True)
class AcknowledgedEarly:
    """A message port's result for an accepted message that is handled after its processor has the status.

    The caller of the hypercall calls ``act`` once the status is in the processor's registers.
    """

    act: Callable[[], None]


class HypercallResult(NamedTuple):
    """The 64-bit result word, and a function to call after the processor has it (None: there is none)."""

    value: int
    act_afterwards: Callable[[], None] | None = None


MessageHandler = Callable[[int, int, bytes], int | AcknowledgedEarly | None]
"""(vp, connection id, payload) -> status (None: success); the payload is a private copy of 0 to 240 bytes."""

_CODE = CONTROL.build(Control(code=0xFFFF))
_FAST = CONTROL.build(Control(code=0, fast=True))
_NOT_IN_A_SIMPLE_CALL = (1 << CONTROL.width) - 1 - _CODE - _FAST
_INPUT_ALIGNMENT = 8
_CONNECTIONS_IN_A_RULE = 32
_LOW32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class HypercallRegisters:
    """The calling processor's registers; ``long_mode``: it runs 64-bit code (EFER.LMA and CS.L)."""

    long_mode: bool
    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0

    @property
    def control(self) -> int:
        """The hypercall input value: call code, flags and repetition counts."""
        return self.rcx if self.long_mode else _pair(self.rdx, self.rax)

    @property
    def input(self) -> int:
        """Address of the input block, or the first eight input bytes of a fast call."""
        return self.rdx if self.long_mode else _pair(self.rbx, self.rcx)

    @property
    def output(self) -> int:
        """Address of the output block, or the second eight input bytes of a fast call."""
        return self.r8 if self.long_mode else _pair(self.rdi, self.rsi)


class _Refused(Exception):
    """A failed check: the call ends with ``status``."""

    def __init__(self, status: HvStatus, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class HypercallCounters:
    """Numbers of calls since the partition was created; a reset does not clear them."""

    messages: int = 0
    events: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    """Status -> number of calls that ended with it, for calls that did not succeed."""


class Hypercalls:
    """Answers hypercalls, and holds the message ports (``message_ports``: connection id -> handler)."""

    def __init__(
        self,
        memory: GuestMemory,
        features: Features,
        event_ports: dict[int, Callable[[], None]],
        refusals: Refusals,
    ) -> None:
        self._memory = memory
        self._features = features
        self._event_ports = event_ports
        self._refusals = refusals
        self.message_ports: dict[int, MessageHandler] = {}
        self.counters = HypercallCounters()

    def doorbell_rules(self, first_connection: int, count: int) -> tuple[DoorbellRule, ...]:
        """Return the rules that make fast HvSignalEvent (flag 0) on ``count`` connections doorbells.

        Doorbell 0 is ``first_connection``. The guest gets HV_STATUS_SUCCESS even for a connection that does not
        exist: guests ignore this status, and waiting for one costs most of a channel's throughput.
        """
        if not self._features.signal_events:
            return ()
        control = _FAST | CallCode.SIGNAL_EVENT
        return (DoorbellRule(control, first_connection, count, first=0, result=HvStatus.SUCCESS),)

    def post_rule(self, messages: Iterable[int], msr: int) -> PostRule:
        """Return the rule that lets HvPostMessage to all ports succeed for ``messages`` (their first words).

        It has the checks of :meth:`call`: what it lets pass ends with HV_STATUS_SUCCESS there, if the port accepts
        the message. ``msr``: an MSR whose writes are to be posted, too.
        """
        offered = self._features.post_messages
        return PostRule(
            control=int(CallCode.POST_MESSAGE),
            messages=sum(1 << number for number in set(messages)) if offered else 0,
            connections=sum(1 << port for port in self.message_ports if port < _CONNECTIONS_IN_A_RULE),
            msr=msr,
        )

    def call(self, vp: int, registers: HypercallRegisters) -> HypercallResult:
        """Answer one hypercall; the caller calls ``act_afterwards`` once the processor has the result."""
        control = registers.control
        code = control & _CODE
        status: int
        act_afterwards: Callable[[], None] | None = None
        try:
            if code == CallCode.SIGNAL_EVENT:
                status = self._signal_event(control, registers.input)
            elif code == CallCode.POST_MESSAGE:
                accepted = self._post_message(vp, control, registers.input)
                if isinstance(accepted, AcknowledgedEarly):
                    status, act_afterwards = HvStatus.SUCCESS, accepted.act
                else:
                    status = accepted
            elif code == CallCode.NOTIFY_LONG_SPIN_WAIT:
                status = HvStatus.SUCCESS
            else:
                raise _Refused(HvStatus.INVALID_HYPERCALL_CODE, "hypercall-unknown", f"code {code:#06x}")
        except _Refused as refused:
            status = refused.status
            self._refusals.refuse(refused.reason, refused.detail)
        if status:
            statuses = self.counters.statuses
            statuses[status] = statuses.get(status, 0) + 1
        return HypercallResult(int(status), act_afterwards)

    def _signal_event(self, control: int, argument: int) -> HvStatus:
        _check_simple(control)
        if control & _FAST:
            data = (argument & 0xFFFFFFFFFFFFFFFF).to_bytes(SIGNAL_EVENT_STRUCT.size, "little")
        else:
            data = self._input(argument, SIGNAL_EVENT_STRUCT.size)
        if not self._features.signal_events:
            raise _Refused(HvStatus.ACCESS_DENIED, "signal-event-not-offered")
        connection_id, flag, reserved = SIGNAL_EVENT_STRUCT.unpack(data)
        if reserved or connection_id & ~CONNECTION_ID_MASK:
            raise _Refused(HvStatus.INVALID_HYPERCALL_INPUT, "signal-event-reserved", data.hex())
        signalled = self._event_ports.get(connection_id)
        if signalled is None:
            raise _Refused(
                HvStatus.INVALID_CONNECTION_ID, "signal-event-unknown-connection", f"{connection_id:#x}"
            )
        if flag:
            raise _Refused(HvStatus.INVALID_PARAMETER, "signal-event-flag", f"flag {flag}")
        self.counters.events += 1
        signalled()
        return HvStatus.SUCCESS

    def _post_message(self, vp: int, control: int, argument: int) -> int | AcknowledgedEarly:
        _check_simple(control)
        if control & _FAST:
            raise _Refused(HvStatus.INVALID_HYPERCALL_INPUT, "post-message-fast")
        data = self._input(argument, POST_MESSAGE_STRUCT.size)
        if not self._features.post_messages:
            raise _Refused(HvStatus.ACCESS_DENIED, "post-message-not-offered")
        connection_id, message_type, size, payload = POST_MESSAGE_STRUCT.unpack(data)
        if size > MESSAGE_PAYLOAD_MAX:
            raise _Refused(HvStatus.INVALID_PARAMETER, "post-message-size", f"{size} bytes")
        if message_type == 0 or message_type >> 31:
            raise _Refused(HvStatus.INVALID_PARAMETER, "post-message-type", f"type {message_type:#x}")
        handler = self.message_ports.get(connection_id)
        if handler is None:
            raise _Refused(
                HvStatus.INVALID_CONNECTION_ID, "post-message-unknown-connection", f"{connection_id:#x}"
            )
        self.counters.messages += 1
        try:
            return handler(vp, connection_id, payload[:size]) or 0
        except GuestError as error:
            # The call itself was valid, only the message in it is not: a host ignores such a message.
            self._refusals.refuse(error.reason, error.detail)
            return HvStatus.SUCCESS

    def _input(self, gpa: int, size: int) -> bytes:
        """Return a copy of the input block. Raises :class:`_Refused`."""
        if gpa % _INPUT_ALIGNMENT:
            raise _Refused(HvStatus.INVALID_ALIGNMENT, "hypercall-input-alignment", f"{gpa:#x}")
        if gpa % PAGE_SIZE + size > PAGE_SIZE:
            raise _Refused(HvStatus.INVALID_HYPERCALL_INPUT, "hypercall-input-crosses-page", f"{gpa:#x}")
        try:
            return self._memory.read(gpa, size)
        except GuestAddressError as error:
            raise _Refused(HvStatus.INVALID_HYPERCALL_INPUT, "hypercall-input-not-ram", str(error)) from error


def _check_simple(control: int) -> None:
    """Refuse every control bit beside code and fast: these calls have no repetitions and no variable header."""
    if control & _NOT_IN_A_SIMPLE_CALL:
        raise _Refused(HvStatus.INVALID_HYPERCALL_INPUT, "hypercall-control", f"{control:#x}")


def _pair(high: int, low: int) -> int:
    return (high & _LOW32) << 32 | low & _LOW32
