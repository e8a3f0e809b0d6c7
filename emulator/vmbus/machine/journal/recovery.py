"""Reads from the journal of an emulator that was killed what a host continues its guest from."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from vmbus.bus.io.state import RingPositions
from vmbus.errors import MalformedError
from vmbus.hypervisor.saved_state.values import TimerState
from vmbus.machine.gateway.traps import GivenAnswer
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
    is_channel,
)
from vmbus.machine.migration.host_state import BusSection, HypervisorSection
from vmbus.machine.migration.hypervisor_layout import SAVED_HYPERVISOR
from vmbus.saving.loading import MachineState, SavedChannelState
from vmbus.saving.state import Assembly
from vmbus.saving.status import StateRefused
from vmbus.wire.codec import Record
from vmbus.wire.saved import ChannelIdentity, SavedSection

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RecoveredGuest:
    """What the journal has of a guest, checked for everything that needs no machine."""

    contents: Contents
    state: MachineState
    positions: Mapping[ChannelIdentity, RingPositions]
    """Where the host stood in the rings of each channel that had any."""
    marks: Mapping[tuple[int, int], int]
    """(VP, SINT) → the mark of the first message in its queue, if that was to be delivered."""
    posts: int
    answers: tuple[GivenAnswer, ...]
    tsc: int
    """The guest's TSC at the last transaction, 0 if it was not known; of a guest that is stopped, the present one."""
    resets: int
    """The gateway's count of resets that the journal belongs to."""


def recover(memory: mmap.mmap | memoryview) -> RecoveredGuest:
    """Return the guest of a journal.

    Raises :class:`~vmbus.machine.journal.reading.JournalRefused`; reason ``ended``: the emulator has given the guest
    up before it ended, or has passed it on; ``state``: the guest's state cannot be read.
    """
    contents = read(memory)
    values = contents.values
    if ENDED in values:
        raise JournalRefused("ended", values[ENDED].decode(errors="replace"))
    about = _parsed(ABOUT_VALUE, values, ABOUT)
    if about.form != FORM:
        raise JournalRefused("version", f"the values have form {about.form}, this emulator reads form {FORM}")
    answers = _parsed(ANSWERS_VALUE, values, ANSWERS)
    marks = _parsed(MARKS_VALUE, values, MARKS)
    channels, positions = [], {}
    try:
        for key, value in values.items():
            if is_channel(key):
                channel = _parse(CHANNEL_VALUE, value)
                state = Assembly().take(channel.chunks).state()
                channels.append(SavedChannelState((channel.chunks,), state))
                if channel.is_open:
                    positions[state.channel.identity] = RingPositions(channel.read, channel.write)
    except StateRefused as error:
        raise JournalRefused("state", str(error)) from error
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
        {(each.vp, each.sint): each.mark for each in marks.slots},
        answers.posts,
        answers.answers,
        _parsed(SAVED_HYPERVISOR, values, HYPERVISOR).tsc,
        about.resets,
    )


def device_lines(memory: mmap.mmap | memoryview) -> tuple[str, ...]:
    """Return the lines of the devices that a journal has, whatever became of its guest.

    Raises :class:`~vmbus.machine.journal.reading.JournalRefused`.
    """
    return _parsed(DEVICES_VALUE, read(memory).values, DEVICES).lines


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
