"""Reads from the journal of an emulator that was killed what a host continues its guest from."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vmbus.bus.io.state import RingPositions
from vmbus.errors import DeviceError, GuestError, MalformedError
from vmbus.hypervisor.saved_state.values import TimerState
from vmbus.machine.engine import mirror
from vmbus.machine.engine.layout import Mirror
from vmbus.machine.gateway.traps import GivenAnswer
from vmbus.machine.journal.areas import areas
from vmbus.machine.journal.reading import Contents, JournalRefused, read
from vmbus.machine.journal.values import (
    ABOUT,
    ABOUT_VALUE,
    ANSWERS,
    ANSWERS_VALUE,
    BUS,
    CHANNEL_VALUE,
    DEVICES,
    DEVICES_VALUE,
    ENDED,
    FORM,
    HYPERVISOR,
    MARKS,
    MARKS_VALUE,
    NO_EXPIRATION,
    TIMERS,
    TIMERS_VALUE,
    ChannelValue,
    identity_of,
    is_channel,
)
from vmbus.machine.migration.host_state import BusSection, HypervisorSection
from vmbus.machine.migration.hypervisor_layout import SAVED_HYPERVISOR
from vmbus.ports import FastLink
from vmbus.saving.device_channel import queued
from vmbus.saving.loading import MachineState, SavedChannelState
from vmbus.saving.state import Assembly, ChannelState
from vmbus.saving.status import Reason, StateRefused
from vmbus.wire.codec import Record
from vmbus.wire.packet import (
    COMPLETION_REQUESTED,
    TRAILER_SIZE,
    Packet,
    PacketType,
    build_trailer,
    parse_packet,
)
from vmbus.wire.saved import ChannelIdentity, SavedCompletion, SavedSection

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RecoveredGuest:
    """What the journal has of a guest, checked for everything that needs no machine."""

    contents: Contents
    state: MachineState
    positions: Mapping[ChannelIdentity, RingPositions]
    """Where the host stood in the rings of each channel that had any."""
    again: Mapping[ChannelIdentity, tuple[Packet, ...]]
    """Packets that compiled code had taken, and whose answers the guest does not have."""
    marks: Mapping[tuple[int, int], int]
    """(VP, SINT) → the mark of the first message in its queue, if that was to be delivered."""
    posts: int
    answers: tuple[GivenAnswer, ...]
    tsc: int
    """The guest's TSC at the last transaction, 0 if it was not known; of a guest that is stopped, the present one."""
    resets: int
    """The gateway's count of resets that the journal belongs to."""
    lost: Mapping[ChannelIdentity, str]
    """Channels whose value cannot be read, with the reason."""


def recover(memory: mmap.mmap | memoryview) -> RecoveredGuest:
    """Return the guest of a journal.

    Raises :class:`~vmbus.machine.journal.reading.JournalRefused`; reason ``ended``: the emulator has given the guest
    up before it ended, or has passed it on; ``state``: the state of the partition or of the bus cannot be read. A
    channel that cannot be read, or of which compiled code has left what cannot be, is in ``lost``.
    """
    journal, beside = areas(memory)
    with journal, beside or contextlib.nullcontext():
        contents = read(journal)
        found = None if beside is None else Mirror.from_buffer_copy(beside)
    values = contents.values
    if ENDED in values:
        raise JournalRefused("ended", values[ENDED].decode(errors="replace"))
    about = _parsed(ABOUT_VALUE, values, ABOUT)
    if about.form != FORM:
        raise JournalRefused("version", f"the values have form {about.form}, this emulator reads form {FORM}")
    answers = _parsed(ANSWERS_VALUE, values, ANSWERS)
    marks = _parsed(MARKS_VALUE, values, MARKS)
    channels, positions, again, lost = [], {}, {}, {}
    for key, value in values.items():
        if not is_channel(key):
            continue
        identity = _identity(key)
        try:
            channel, state = _channel(value, identity)
            if channel.is_open:
                state, positions[identity], again[identity] = continued(channel, state, found)
        except (GuestError, DeviceError, StateRefused) as error:
            lost[identity] = str(error)
            continue
        channels.append(SavedChannelState((channel.chunks,), state))
    machine = MachineState(
        "the emulator that was killed",
        SavedSection(HypervisorSection.name, HypervisorSection.version, _with_timers(values)),
        SavedSection(BusSection.name, BusSection.version, _value(values, BUS)),
        tuple(channels),
    )
    return RecoveredGuest(
        contents,
        machine,
        positions,
        again,
        {(each.vp, each.sint): each.mark for each in marks.slots},
        answers.posts,
        answers.answers,
        _parsed(SAVED_HYPERVISOR, values, HYPERVISOR).tsc,
        about.resets,
        lost,
    )


def device_lines(memory: mmap.mmap | memoryview) -> tuple[str, ...]:
    """Return the lines of the devices that a journal has, whatever became of its guest.

    Raises :class:`~vmbus.machine.journal.reading.JournalRefused`.
    """
    return _parsed(DEVICES_VALUE, contents_of(memory).values, DEVICES).lines


def contents_of(memory: mmap.mmap | memoryview) -> Contents:
    """Return what the journal in the memory that outlives an emulator has.

    Raises :class:`~vmbus.machine.journal.reading.JournalRefused`.
    """
    journal, beside = areas(memory)
    with journal, beside or contextlib.nullcontext():
        return read(journal)


def continued(
    value: ChannelValue, state: ChannelState, found: Mirror | None
) -> tuple[ChannelState, RingPositions, tuple[Packet, ...]]:
    """Return a channel's state with what compiled code had done since, its positions, and the packets left to do.

    Raises ``GuestError`` or ``DeviceError`` for what compiled code cannot have left.
    """
    positions = RingPositions(value.read, value.write)
    if not value.links or state.channel.failure:  # a channel that has failed holds nothing
        return state, positions, ()
    link = value.links[-1]
    if found is None:
        raise MalformedError("engine-mirror", "there is none")
    left = mirror.recover(
        found, FastLink(link.epoch, link.channel, link.opening, link.gives, bool(link.given), link.adopted)
    )
    answers = tuple(_answer(each) for each in left.answers)
    packets = tuple(_packet(each) for each in left.packets)
    queue = answers if left.queue_written else answers + state.queue
    return dataclasses.replace(state, queue=queue), left.positions or positions, packets


def _answer(data: bytes) -> SavedCompletion:
    """Return a completion. Raises ``GuestError`` or ``DeviceError`` for anything else."""
    found = queued(data)
    if not isinstance(found, SavedCompletion):
        raise MalformedError("engine-mirror", "an answer that is no completion")
    return found


def _packet(data: bytes) -> Packet:
    """Return a packet that was in a ring. Raises ``GuestError`` for one that compiled code does not take."""
    found = parse_packet(data + build_trailer(0, 0), 0, len(data) + TRAILER_SIZE)
    if found is None or found.size != len(data) + TRAILER_SIZE:
        raise MalformedError("engine-mirror", f"{len(data)} bytes that are not a packet")
    if found.error is not None:
        raise MalformedError("engine-mirror", str(found.error))
    if found.kind is PacketType.COMPLETION or not found.flags & COMPLETION_REQUESTED:
        raise MalformedError(
            "engine-mirror", f"a packet of kind {found.kind} with the flags {found.flags:#x}"
        )
    return found


def _identity(key: bytes) -> ChannelIdentity:
    try:
        return identity_of(key)
    except MalformedError as error:
        raise JournalRefused("state", str(error)) from error


def _channel(value: bytes, identity: ChannelIdentity) -> tuple[ChannelValue, ChannelState]:
    """Return what is kept of a channel. Raises ``MalformedError`` or ``StateRefused``."""
    channel, _ = CHANNEL_VALUE.parse_all(value)
    state = Assembly().take(channel.chunks).state()
    if state.channel.identity != identity:
        raise StateRefused(
            Reason.FOREIGN_CHANNEL,
            f"the value of channel {identity} has the state of {state.channel.identity}",
        )
    return channel, state


def _with_timers(values: Mapping[bytes, bytes]) -> bytes:
    """Return the hypervisor section with the timers that were written since."""
    saved = _parsed(SAVED_HYPERVISOR, values, HYPERVISOR)
    timers = _parsed(TIMERS_VALUE, values, TIMERS).timers
    each_has = [len(vp.timers) for vp in saved.partition.vps]
    if sum(each_has) != len(timers):
        raise JournalRefused("state", f"{len(timers)} timers, {sum(each_has)} were expected")
    states: Iterable[TimerState] = (
        TimerState(each.config, each.count, None if each.expiration == NO_EXPIRATION else each.expiration)
        for each in timers
    )
    left = list(states)
    vps = []
    for vp, count in zip(saved.partition.vps, each_has, strict=True):
        vps.append(dataclasses.replace(vp, timers=tuple(left[:count])))
        del left[:count]
    partition = dataclasses.replace(saved.partition, vps=tuple(vps))
    return SAVED_HYPERVISOR.build(dataclasses.replace(saved, partition=partition))


def _value(values: Mapping[bytes, bytes], key: bytes) -> bytes:
    try:
        return values[key]
    except KeyError:
        raise JournalRefused("state", f"it has no value {key.decode()!r}") from None


def _parsed(record: Record[_T], values: Mapping[bytes, bytes], key: bytes) -> _T:
    return _parse(record, _value(values, key))


def _parse(record: Record[_T], value: bytes) -> _T:
    try:
        found, _ = record.parse_all(value)
    except MalformedError as error:
        raise JournalRefused("state", str(error)) from error
    return found
