"""Saved states of the bus that are refused: too much was agreed, contradictions, limits."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import pytest
from vmbus.bus.channel.gpadl import MAX_ASSEMBLIES
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import DEFAULT_FEATURES, MonitorPages, NextAction, Phase
from vmbus.bus.outbox import Outgoing, Target
from vmbus.bus.saved_state.layout import SAVED_BUS
from vmbus.bus.saved_state.restore import BusStateRefused
from vmbus.bus.saved_state.values import (
    MAX_INBOX,
    MAX_OUTBOX,
    AssemblyRecord,
    BusState,
    GpadlRecord,
    RangeRecord,
    WaitingMessage,
)
from vmbus.errors import InternalError, MalformedError
from vmbus.ports import PAGE_SIZE
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest
from vmbus.wire.gpadl import GpaRange, split_gpadl
from vmbus.wire.messages import (
    REQUESTOFFERS,
    HeaderOnly,
)
from vmbus.wire.plain import encode_varint
from vmbus.wire.version import ALL_FEATURES, Feature, Version

from tests.unit.bus.moving import offer


@pytest.mark.conformance(52)
@pytest.mark.parametrize(
    ("version", "features", "options", "reason"),
    [
        (Version.IRON, Feature(0), {"max_version": Version.WIN10_RS5}, "unsupported-version"),
        (Version.COPPER, Feature(0), {"max_version": Version.IRON}, "unsupported-version"),
        (
            Version.COPPER,
            Feature.PAUSE_RESUME | Feature.MODIFY_CONNECTION,
            {"supported_flags": Feature.PAUSE_RESUME},
            "unsupported-features",
        ),
    ],
)
@pytest.mark.parametrize("only_reserved", [False, True])
def test_less_than_was_agreed_is_refused_with_its_own_reason(
    guest: ScriptedGuest,
    version: Version,
    features: Feature,
    options: dict[str, Any],
    reason: str,
    only_reserved: bool,
) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect(version, features=features)
    if only_reserved:
        guest.open_reserved(1, guest.share(1))
        guest.unload()
    state = guest.save()
    bus = guest.another_bus(**options)
    with pytest.raises(BusStateRefused) as caught:
        bus.restore(state)
    assert caught.value.reason == reason
    assert not bus.paused
    assert bus.channels == ()


@pytest.mark.conformance(52)
@pytest.mark.parametrize("only_reserved", [False, True])
def test_features_before_6_0_are_refused(guest: ScriptedGuest, only_reserved: bool) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect(Version.IRON)
    if only_reserved:
        guest.open_reserved(1, guest.share(1))
        guest.unload()
    state = guest.save()
    if only_reserved:
        (channel,) = state.channels
        assert channel.request is not None and channel.request.reserved is not None
        client = dataclasses.replace(channel.request.reserved, features=Feature.PAUSE_RESUME)
        request = dataclasses.replace(channel.request, reserved=client)
        state = dataclasses.replace(state, channels=(dataclasses.replace(channel, request=request),))
    else:
        agreed = dataclasses.replace(state.connection, features=Feature.PAUSE_RESUME)
        state = dataclasses.replace(state, connection=agreed)
    with pytest.raises(BusStateRefused, match=r"features-before-6\.0"):
        guest.another_bus().restore(state)


def test_state_for_a_bus_with_a_guest_is_refused(guest: ScriptedGuest) -> None:
    guest.connect()
    state = guest.save()
    with pytest.raises(BusStateRefused, match="not-fresh"):
        guest.bus.restore(state)
    bus = guest.another_bus()
    bus.restore(state)
    with pytest.raises(BusStateRefused, match="not-fresh"):
        bus.restore(state)


def test_server_monitor_pages_must_be_the_same() -> None:
    options: dict[str, Any] = {"supported_flags": ALL_FEATURES}
    guest = ScriptedGuest.on_fakes(server_monitor_pages=MonitorPages(0x5000, 0x6000), **options)
    guest.connect(Version.COPPER, features=Feature.SERVER_SPECIFIED_MONITOR_PAGES)
    state = guest.save()
    with pytest.raises(BusStateRefused, match="monitor-pages"):
        guest.another_bus(server_monitor_pages=MonitorPages(0x5000, 0x7000), **options).restore(state)
    with pytest.raises(BusStateRefused, match="unsupported-features"):
        guest.another_bus(**options).restore(state)
    guest.another_bus(server_monitor_pages=MonitorPages(0x5000, 0x6000), **options).restore(state)


@pytest.fixture
def rich(guest: ScriptedGuest) -> BusState:
    """A state with something of everything."""
    offer(guest, RecordingEndpoint(), RecordingEndpoint(), RecordingEndpoint())
    guest.connect(Version.COPPER, features=DEFAULT_FEATURES & ~Feature.CLIENT_ID)
    guest.open_channel(1, connection_id=0x2001, event_flag=1)
    guest.share(2)
    guest.ask(split_gpadl(2, 7, [GpaRange(60 * PAGE_SIZE, 0, list(range(100, 160)))])[0])
    guest.bus.pause()
    guest.post(REQUESTOFFERS.build(HeaderOnly()))
    guest.bus.send(b"\x02" + bytes(11))
    return guest.save()


def test_rich_state_is_accepted(guest: ScriptedGuest, rich: BusState) -> None:
    bus = guest.another_bus()
    bus.restore(rich)
    assert bus.save() == rich


def changed(what: Any, **fields: Any) -> Any:
    return dataclasses.replace(what, **fields)


def channel_with(number: int, **fields: Any) -> Any:
    def change(state: BusState) -> BusState:
        channels = list(state.channels)
        channels[number] = changed(channels[number], **fields)
        return changed(state, channels=tuple(channels))  # type: ignore[no-any-return]

    return change


def connection_with(**fields: Any) -> Any:
    return lambda state: changed(state, connection=changed(state.connection, **fields))


def request_with(**fields: Any) -> Any:
    return lambda state: channel_with(0, request=changed(state.channels[0].request, **fields))(state)


def ranges(*each: tuple[int, int, tuple[tuple[int, int], ...]]) -> tuple[GpadlRecord, ...]:
    return (GpadlRecord(99, tuple(RangeRecord(*one) for one in each)),)


CONTRADICTIONS = [
    ("inconsistent", connection_with(version=None)),
    ("inconsistent", connection_with(phase=Phase.DISCONNECTED)),
    ("inconsistent", connection_with(target=Target(4, 2))),
    ("inconsistent", connection_with(target=Target(0, 16))),
    ("not-ram", connection_with(monitor_pages=MonitorPages(0x5000, 1 << 40))),
    ("not-ram", connection_with(interrupt_page=0x5001)),
    ("unsupported-features", connection_with(features=ALL_FEATURES)),
    ("inconsistent", connection_with(next_action=NextAction.CONTACT)),
    ("inconsistent", connection_with(next_action=NextAction.UNLOAD_RESPONSE)),
    ("inconsistent", connection_with(phase=Phase.DISCONNECTING)),
    ("inconsistent", channel_with(0, abandoned=True)),
    ("inconsistent", channel_with(0, revoking=True)),
    ("inconsistent", channel_with(0, released_by_guest=True)),
    ("inconsistent", channel_with(1, abandoned=True)),
    ("inconsistent", channel_with(1, revoking=True)),
    ("inconsistent", channel_with(1, released_by_guest=True)),
    ("inconsistent", channel_with(1, relid=1)),
    ("inconsistent", channel_with(1, relid=None)),
    ("inconsistent", channel_with(1, relid=2048)),
    ("inconsistent", channel_with(1, state=ChannelState.RELEASED)),
    ("inconsistent", channel_with(1, state=ChannelState.OPEN)),
    ("inconsistent", channel_with(0, state=ChannelState.CLOSED)),
    ("inconsistent", channel_with(0, gpadls=())),
    ("inconsistent", channel_with(0, target_vp=4)),
    ("inconsistent", channel_with(0, pending_target=-1)),
    ("inconsistent", channel_with(0, monitor_id=128)),
    ("inconsistent", channel_with(0, close_answer=Target(0, 99))),
    ("inconsistent", request_with(downstream_offset=7)),
    ("inconsistent", request_with(event_flag=2048)),
    ("inconsistent", request_with(connection_id=3)),
    ("inconsistent", request_with(target_vp=9)),
    ("inconsistent", channel_with(1, gpadls=ranges())),
    ("inconsistent", channel_with(1, gpadls=ranges((0, 0, ())))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 0, ((1, 2),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 4096, ((1, 2),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((8192, 0, ((1, 3), (5, -1)))))),
    ("inconsistent", channel_with(1, gpadls=ranges((1 << 45, 0, ((0, 1 << 33),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 0, ((1 << 52, 1),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 0, ((1, 1),))) * 2)),
    ("not-ram", channel_with(1, gpadls=ranges((4096, 0, ((1 << 40, 1),))))),
    ("inconsistent", lambda state: changed(state, channels=state.channels + state.channels[:1])),
    (
        "inconsistent",
        lambda state: changed(state, assemblies=(changed(state.assemblies[0], relid=9),)),
    ),
    (
        "inconsistent",
        lambda state: changed(state, assemblies=(changed(state.assemblies[0], data=bytes(488)),)),
    ),
    (
        "inconsistent",
        lambda state: changed(state, assemblies=(changed(state.assemblies[0], data=bytes(7)),)),
    ),
    ("inconsistent", lambda state: changed(state, assemblies=state.assemblies * 2)),
    ("inconsistent", lambda state: changed(state, inbox=(changed(state.inbox[0], payload=bytes(241)),))),
    ("inconsistent", lambda state: changed(state, outbox=(Outgoing(Target(0, 2), bytes(241)),))),
    ("inconsistent", lambda state: changed(state, outbox=(Outgoing(Target(9, 2), bytes(8)),))),
]


@pytest.mark.parametrize(("reason", "change"), CONTRADICTIONS)
def test_state_that_contradicts_itself_or_the_machine_changes_nothing(
    guest: ScriptedGuest, rich: BusState, reason: str, change: Any
) -> None:
    bus = guest.another_bus()
    with pytest.raises(BusStateRefused) as caught:
        bus.restore(change(rich))
    assert caught.value.reason == reason
    assert (bus.paused, bus.channels, bus.gpadl_assembler.quota.gpadls) == (False, (), 0)
    assert set(guest.synic.ports) == {2, 3}
    assert bus.connection.next_action is NextAction.NONE
    bus.restore(rich)


@pytest.mark.parametrize(
    ("part", "each", "most"),
    [
        ("inbox", WaitingMessage(1, b""), MAX_INBOX),
        ("outbox", Outgoing(Target(0, 2), b"x"), MAX_OUTBOX),
        ("assemblies", AssemblyRecord(1, 2, 8, 1, b""), MAX_ASSEMBLIES),
    ],
)
def test_more_of_anything_than_there_can_be_is_refused_before_it_is_allocated(
    guest: ScriptedGuest, part: str, each: Any, most: int
) -> None:
    """A state of 3 MB had 400,000 messages where 16 are possible, and took a hundred times as much memory."""
    state = changed(guest.bus.save(), **{part: (each,)})
    one = SAVED_BUS.build(state)
    fits = SAVED_BUS.build(changed(state, **{part: (each,) * most}))
    assert len(getattr(SAVED_BUS.parse(fits), part)) == most
    with pytest.raises(InternalError, match="at most"):
        SAVED_BUS.build(changed(state, **{part: (each,) * (most + 1)}))
    empty = SAVED_BUS.build(changed(state, **{part: ()}))
    at = next(index for index in range(len(empty)) if empty[index] != one[index])
    bytes_of_one = one[at + 1 : len(one) - (len(empty) - at - 1)]
    many = empty[:at] + encode_varint(400_000) + bytes_of_one * 400_000 + empty[at + 1 :]
    tracemalloc.start()
    try:
        with pytest.raises(MalformedError, match="at most"):
            SAVED_BUS.parse(many)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < len(many) + (1 << 20)
