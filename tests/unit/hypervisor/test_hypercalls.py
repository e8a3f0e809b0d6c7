"""HvPostMessage, HvSignalEvent and other hypercalls (docs/protocol/discovery.md#hypercalls)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import ProtocolError
from vmbus.hypervisor import Features, HypercallRegisters
from vmbus.hypervisor.hypercalls import AcknowledgedEarly
from vmbus.wire.hypercall import (
    CONTROL,
    POST_MESSAGE_INPUT,
    POST_MESSAGE_STRUCT,
    SIGNAL_EVENT_INPUT,
    SIGNAL_EVENT_STRUCT,
    Control,
    HvStatus,
    PostMessageInput,
    SignalEventInput,
)

from tests.unit.hypervisor.scripted_guest import NOT_RAM, RAM_SIZE, ScriptedGuest

FAST = 1 << 16
POST = 0x5C
SIGNAL = 0x5D


@pytest.fixture
def messages(running: ScriptedGuest) -> list[tuple[int, int, bytes]]:
    """Return the messages that arrive at connection 1."""
    arrived: list[tuple[int, int, bytes]] = []
    running.partition.connect_message_port(1, lambda *message: arrived.append(message))
    return arrived


@pytest.fixture
def events(running: ScriptedGuest) -> list[int]:
    """Return the events that arrive at connection 0x2001."""
    arrived: list[int] = []
    running.synic.connect_event_port(0x2001, lambda: arrived.append(0x2001))
    return arrived


Messages = list[tuple[int, int, bytes]]

# --- HvPostMessage ---


@pytest.mark.parametrize("long", [True, False])
@pytest.mark.parametrize("size", [0, 1, 8, 240])
def test_message_reaches_its_port(running: ScriptedGuest, messages: Messages, long: bool, size: int) -> None:
    payload = bytes(range(size))
    assert running.post(payload, long=long, vp=1) == HvStatus.SUCCESS
    assert messages == [(1, 1, payload)]


def test_message_at_the_end_of_a_page(running: ScriptedGuest, messages: Messages) -> None:
    assert running.post(address=0x2000 - 256) == HvStatus.SUCCESS
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("row", "arguments", "status"),
    [
        ("fast bit set", {"control": POST | FAST}, 3),
        ("misaligned", {"address": 0x1004}, 4),
        ("crosses a page", {"address": 0x2000 - 248}, 3),
        ("not RAM", {"address": RAM_SIZE}, 3),
        ("far outside", {"address": NOT_RAM}, 3),
        ("size over 240", {"size": 241}, 5),
        ("size far over 240", {"size": 0xFFFFFFFF}, 5),
        ("unknown connection", {"connection": 2}, 0x12),
        ("connection id beyond 24 bits", {"connection": 0x1000001}, 0x12),
        ("type 0", {"message_type": 0}, 5),
        ("type of the hypervisor", {"message_type": 0x80000000}, 5),
        ("rep count", {"control": POST | 1 << 32}, 3),
        ("rep start", {"control": POST | 1 << 48}, 3),
        ("variable header", {"control": POST | 1 << 17}, 3),
        ("nested", {"control": POST | 1 << 31}, 3),
        ("reserved 30:27", {"control": POST | 1 << 27}, 3),
        ("reserved 47:44", {"control": POST | 1 << 44}, 3),
        ("reserved 63:60", {"control": POST | 1 << 63}, 3),
    ],
)
@pytest.mark.parametrize("long", [True, False])
def test_post_message_refusal(
    running: ScriptedGuest, messages: Messages, row: str, arguments: dict[str, Any], status: int, long: bool
) -> None:
    assert running.post(long=long, **arguments) == status
    assert messages == []
    assert running.partition.refusals.total == 1
    assert running.partition.hypercalls.counters.statuses == {status: 1}


def test_port_with_a_full_queue_makes_the_guest_retry(running: ScriptedGuest) -> None:
    running.partition.connect_message_port(1, lambda *message: HvStatus.INSUFFICIENT_BUFFERS)
    assert running.post() == 0x13


def test_port_that_acknowledges_early_acts_after_the_answer(running: ScriptedGuest) -> None:
    acted: list[bytes] = []
    running.partition.connect_message_port(
        1, lambda vp, connection_id, payload: AcknowledgedEarly(lambda: acted.append(payload))
    )
    running.memory.write(0x1000, POST_MESSAGE_STRUCT.pack(1, 1, 3, b"abc"))
    registers = HypercallRegisters(long_mode=True, rcx=POST, rdx=0x1000)
    value, act_afterwards = running.partition.hypercall(0, registers)
    assert value == HvStatus.SUCCESS and act_afterwards is not None and acted == []
    act_afterwards()
    assert acted == [b"abc"]


def test_payload_shorter_than_a_header_is_accepted(running: ScriptedGuest, messages: Messages) -> None:
    assert running.post(b"abc") == HvStatus.SUCCESS
    assert messages == [(0, 1, b"abc")]


def test_port_that_refuses_the_content_still_consumes_it(running: ScriptedGuest) -> None:
    def refuse(vp: int, connection_id: int, payload: bytes) -> int:
        raise ProtocolError("bus-message-unknown")

    running.partition.connect_message_port(1, refuse)
    assert running.post() == HvStatus.SUCCESS
    assert running.partition.refusals.counts == {"bus-message-unknown": 1}


def test_message_is_a_copy(running: ScriptedGuest, messages: Messages) -> None:
    running.post(b"original", address=0x3000)
    running.memory.write(0x3000, bytes(256))
    assert messages == [(0, 1, b"original")]


def test_post_message_without_the_privilege(guest: ScriptedGuest) -> None:
    guest = ScriptedGuest(features=Features(post_messages=False))
    guest.enable_hypercalls()
    assert guest.post() == 6


# --- HvSignalEvent ---


def signal(
    guest: ScriptedGuest, connection: int, flag: int = 0, reserved: int = 0, control: int = 0, **how: bool
) -> int:
    block = SIGNAL_EVENT_INPUT.build(SignalEventInput(connection, flag, reserved))
    if how.pop("fast", True):
        return guest.vmcall(SIGNAL | FAST | control, int.from_bytes(block, "little"), **how)
    guest.memory.write(0x1008, block)
    return guest.vmcall(SIGNAL | control, 0x1008, **how)


@pytest.mark.parametrize("long", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_event_reaches_its_port(running: ScriptedGuest, events: list[int], long: bool, fast: bool) -> None:
    assert signal(running, 0x2001, long=long, fast=fast) == HvStatus.SUCCESS
    assert events == [0x2001]


@pytest.mark.parametrize(
    ("row", "arguments", "status"),
    [
        ("unknown connection", {"connection": 0x2002}, 0x12),
        ("message connection", {"connection": 1}, 0x12),
        ("flag", {"connection": 0x2001, "flag": 1}, 5),
        ("reserved", {"connection": 0x2001, "reserved": 1}, 3),
        ("connection id beyond 24 bits", {"connection": 0x1002001}, 3),
        ("rep count", {"connection": 0x2001, "control": 1 << 32}, 3),
        ("rep start", {"connection": 0x2001, "control": 1 << 48}, 3),
        ("variable header", {"connection": 0x2001, "control": 1 << 17}, 3),
        ("reserved control", {"connection": 0x2001, "control": 1 << 60}, 3),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("long", [True, False])
def test_signal_event_refusal(
    running: ScriptedGuest,
    events: list[int],
    row: str,
    arguments: dict[str, Any],
    status: int,
    fast: bool,
    long: bool,
) -> None:
    assert signal(running, fast=fast, long=long, **arguments) == status
    assert events == []
    assert running.partition.refusals.total == 1


@pytest.mark.parametrize(
    ("address", "status"), [(0x1004, 4), (0x1001, 4), (RAM_SIZE, 3), (NOT_RAM, 3), ((1 << 64) - 8, 3)]
)
def test_slow_signal_with_a_bad_address(running: ScriptedGuest, address: int, status: int) -> None:
    assert running.vmcall(SIGNAL, address) == status


def test_disconnected_port_is_unknown(running: ScriptedGuest, events: list[int]) -> None:
    running.synic.disconnect_event_port(0x2001)
    running.synic.disconnect_event_port(0x2001)
    assert signal(running, 0x2001) == 0x12


def test_signal_event_without_the_privilege() -> None:
    guest = ScriptedGuest(features=Features(signal_events=False))
    guest.enable_hypercalls()
    guest.synic.connect_event_port(0x2001, lambda: None)
    assert signal(guest, 0x2001) == 6
    assert guest.partition.doorbell_rules(0x2000, 16) == ()


def test_doorbell_rule_is_the_fast_signal(running: ScriptedGuest, events: list[int]) -> None:
    (rule,) = running.partition.doorbell_rules(0x2000, 2048)
    assert (rule.control, rule.base, rule.count, rule.first, rule.result) == (
        SIGNAL | FAST,
        0x2000,
        2048,
        0,
        0,
    )
    running.synic.ring_event_port(0x2001)
    assert events == [0x2001]
    running.synic.ring_event_port(0x2002)
    assert running.partition.refusals.counts == {"doorbell-unknown-connection": 1}


# --- other hypercalls ---


@pytest.mark.parametrize(
    "code",
    [0, 0x02, 0x03, 0x0B, 0x13, 0x14, 0x15, 0x46, 0x50, 0x51, 0x7E, 0xAF, 0xB0, 0x8001, 0x8002, 0xFFFF],
)
@pytest.mark.parametrize("extra", [0, FAST, 1 << 31, 1 << 60])
def test_unknown_code(running: ScriptedGuest, code: int, extra: int) -> None:
    assert running.vmcall(code | extra, 0x1000, 0x1000) == HvStatus.INVALID_HYPERCALL_CODE


def test_long_spin_wait_is_a_hint(running: ScriptedGuest) -> None:
    assert running.vmcall(0x8 | FAST, 4096) == HvStatus.SUCCESS


def test_registers_beyond_32_bits_do_not_count_in_32_bit_mode(
    running: ScriptedGuest, messages: Messages
) -> None:
    running.post(b"x" * 8, address=0x1000)
    high = 0xDEAD << 32
    registers = HypercallRegisters(
        long_mode=False, rax=high | POST, rdx=high, rbx=high, rcx=high | 0x1000, rdi=high, rsi=high
    )
    assert running.partition.hypercall(0, registers).value == HvStatus.SUCCESS
    assert len(messages) == 2


@settings(deadline=None)
@given(
    st.builds(
        PostMessageInput,
        connection_id=st.integers(0, 0xFFFFFFFF),
        message_type=st.integers(0, 0xFFFFFFFF),
        payload_size=st.integers(0, 0xFFFFFFFF),
        payload=st.binary(min_size=240, max_size=240),
    )
)
def test_derived_struct_of_post_message_is_the_declaration(block: PostMessageInput) -> None:
    data = POST_MESSAGE_INPUT.build(block)
    assert PostMessageInput(*POST_MESSAGE_STRUCT.unpack(data)) == block == POST_MESSAGE_INPUT.parse(data)


@settings(deadline=None)
@given(st.binary(min_size=8, max_size=8))
def test_derived_struct_of_signal_event_is_the_declaration(data: bytes) -> None:
    assert SignalEventInput(*SIGNAL_EVENT_STRUCT.unpack(data)) == SIGNAL_EVENT_INPUT.parse(data)


@settings(deadline=None)
@given(st.integers(0, (1 << 64) - 1))
def test_control_word_round_trip(value: int) -> None:
    control = CONTROL.parse(value)
    assert CONTROL.build(control) == value
    declared = CONTROL.struct.parse(value.to_bytes(8, "little"))
    assert control == Control(**{name: declared[name] for name in Control.__slots__})
