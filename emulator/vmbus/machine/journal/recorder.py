"""Keeps the journal of a running guest: what the next emulator needs if this one is killed.

Everything that the guest can see of the host's work happens after it is in the journal, or can be found out
afterwards:

    handle traps and posts ──▶ commit ──▶ answer the traps, free the posts' room, write message slots
    take a batch of packets ─▶ commit ──▶ free their room in the ring, write answers to the other ring

Killed before a commit, what was handled still waits where it came from (a slot of the gateway, the ring of posts, the
guest's ring), and is handled again by a host that is as before. Killed after it, what follows is done once more, or
was done already, and that can be seen: an answer by its sequence number, a post by the number of those that were
handled, a message by its mark (:mod:`vmbus.hypervisor.messages`), packets by the write index of their ring.

What compiled code does while it has a channel is not in the journal, but in the mirror beside it, where the channel's
value says (:mod:`vmbus.machine.engine.mirror`).

Doorbells, event flags and interrupts are not kept: the next host signals all channels in both directions, and
interrupts wherever a flag or a message is present.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.saved_state.layout import SAVED_BUS
from vmbus.bus.saved_state.values import BusState
from vmbus.bus.server import Bus
from vmbus.errors import VmbusError
from vmbus.hypervisor.partition import Partition
from vmbus.machine.clock import TcgClock
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.traps import GivenAnswer
from vmbus.machine.journal.store import Journal, JournalFull
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
    About,
    Answers,
    ChannelValue,
    Devices,
    Link,
    Marks,
    SlotMark,
    Timer,
    Timers,
    channel_key,
    is_channel,
)
from vmbus.machine.migration.host_state import HostState, offered
from vmbus.machine.migration.hypervisor_layout import SAVED_HYPERVISOR, SavedAnswer, SavedHypervisor
from vmbus.saving.chunks import encode_all
from vmbus.saving.device_channel import DeviceChannel
from vmbus.saving.state import OutgoingPacket
from vmbus.wire.saved import SAVED_PACKET, SavedOutgoing

_logger = logging.getLogger(__name__)

_SAVE_ID = 0
"""Of all chunks: each is written by one process, in one go."""

_NOTHING: dict[tuple[int, int], int] = {}


@dataclass(slots=True)
class Round:
    """What was done in one look at the gateway, and what is to be done after the commit."""

    answers: list[GivenAnswer] = field(default_factory=list)
    guest: bool = False
    """Whether something may have changed besides timers."""
    timers: int = 0
    """Processors up to the last of which a synthetic timer was written."""


@dataclass(frozen=True, slots=True)
class RecordedParts:
    """The parts of a host that are recorded."""

    partition: Partition
    bus: Bus
    clock: TcgClock
    gateway: Gateway
    state: HostState


class Recorder:
    """Records the guest of ``parts`` in ``journal``.

    ``broken`` is called with an internal error of a step that the event loop called. ``full``: the journal has no
    room, and goes no further.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        journal: Journal,
        parts: RecordedParts,
        *,
        broken: Callable[[Exception], None],
        full: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._journal = journal
        self._parts = parts
        self._broken = broken
        self._full = full
        self._wanted = False
        """Whether messages wait for a commit."""
        self._expired = 0
        """Processors up to the last of which a synthetic timer has expired without a message."""
        self._step: asyncio.Handle | None = None
        self._ready: dict[tuple[int, int], int] = _NOTHING
        """Slots that the last commit has announced, and the marks of their messages."""
        self._resets = parts.gateway.resets
        """Resets of the machine that the host knows of; the gateway may have counted one more."""
        self._vps = 0
        """Processors that are in the journal."""
        self._offered = offered(parts.partition.features)
        self._bus: BusState | None = None
        """The bus as it was built last."""
        self._built_bus = b""
        self._seen: dict[bytes, tuple[object, ...]] = {}
        self._known: tuple[DeviceChannel, ...] = ()
        """The channels that are in the journal."""
        self._devices: dict[bytes, bytes] = {}
        """Devices' states that are in the journal, by the keys of their primary channels."""
        self._paused_because = "the emulator that began it was killed before its guest was served"
        self._lines: bytes | None = None
        """Lines of the devices, if the journal does not have them yet."""
        self.commits = 0
        """Transactions."""

    # --- the life of the journal ---

    def begin(self) -> None:
        """Record all of the guest, and everything from now on."""
        self._parts.partition.synic.gate = self.want
        self._parts.partition.synthetic_timers.silent = self.expired
        self._parts.gateway.posts.hold = True
        self._paused_because = ""
        self._resets = self._parts.gateway.resets
        self._seen.clear()
        self._devices.clear()
        changes: dict[bytes, bytes | None] = {key: None for key in self._journal.values if is_channel(key)}
        self._commit({**changes, ENDED: None, **self._guest(_NOTHING), **self._after([])})
        self.want()

    def pause(self, reason: str) -> None:
        """Say in the journal that the guest cannot be taken over, until :meth:`begin`; ``reason``: a sentence."""
        if not self._paused_because:
            self._paused_because = reason
            # Nothing else stays, so that there is room for it in a journal that is full.
            self._journal.commit({**dict.fromkeys(self._journal.values), ENDED: reason.encode()})

    def leave(self) -> None:
        """Write nothing until :meth:`begin`: another process may. What the journal has stays valid."""
        self._paused_because = "another process has it"

    def end(self) -> None:
        """Deliver messages without the journal from now on. What it has stays, for the next emulator."""
        if self._step is not None:
            self._step.cancel()
            self._step = None
        self._parts.partition.synic.gate = None
        self._parts.partition.synthetic_timers.silent = None
        self._parts.gateway.posts.hold = False
        self._paused_because = "it has ended"
        self._journal.close()

    # --- what is called while the guest is served ---

    def want(self) -> None:
        """Commit, and deliver the messages that wait, at the end of this round, or soon: a gate of the SynIC."""
        self._wanted = True
        self._soon()

    def reset(self) -> None:
        """Commit, soon, that the host has dropped all of its guest after a reset of the machine.

        Until then the journal is that of a guest which is gone.
        """
        self._resets = self._parts.gateway.resets
        self.want()

    def expired(self, vp: int) -> None:
        """Commit that a synthetic timer of ``vp`` has expired without a message, soon.

        Its interrupt was requested: an emulator that is killed before the commit requests it once more.
        """
        self._expired = max(self._expired, vp + 1)
        self._soon()

    def devices(self, lines: Sequence[str]) -> None:
        """Record the lines of the host's devices together with what the next round changes."""
        self._lines = DEVICES_VALUE.build(Devices(tuple(lines)))
        if not self._paused_because:
            self.want()

    def round_ended(self, done: Round) -> None:
        """Commit what a round has changed. Then the caller answers its traps, and calls :meth:`deliver`."""
        timers, self._expired = max(done.timers, self._expired), 0
        if done.guest or self._wanted or timers > self._vps:
            self._ready = self._commit_guest(done.answers)
        elif timers:
            self._commit({TIMERS: self._timers(), **self._after(done.answers)})

    def deliver(self) -> None:
        """Write the messages that the last commit has announced."""
        ready, self._ready = self._ready, _NOTHING
        self._parts.partition.synic.deliver(ready)

    def channel(self, io: ChannelIo) -> None:
        """Record a channel whose packets are about to be freed or answered; see ``ChannelIo``'s ``record``."""
        if self._paused_because:
            return
        channels = self._parts.state.channels()
        for each in channels:
            if each.io is io:
                changes = {
                    channel_key(each.identity): self._channel(each),
                    **self._changed_device(each, channels),
                }
                # What the device did to the bus belongs to the same moment; a guest may take no messages now.
                if self._wanted or channels != self._known:
                    changes = {**self._guest(_NOTHING), **changes}
                self._commit(changes)
                return

    # --- private ---

    def _soon(self) -> None:
        if self._step is None:
            self._step = self._loop.call_soon(self._take_step)

    def _take_step(self) -> None:
        self._step = None
        if not self._wanted and not self._expired:
            return
        try:
            self.round_ended(Round())
            self._parts.gateway.posts.release()
            self.deliver()
        except Exception as error:  # noqa: BLE001 - the event loop would only log it, and the guest wait for ever
            self._broken(error)

    def _commit_guest(self, answers: Sequence[GivenAnswer]) -> dict[tuple[int, int], int]:
        self._wanted = False
        ready = self._parts.partition.synic.ready()
        self._commit({**self._guest(ready), **self._after(answers)})
        return ready

    def _commit(self, changes: dict[bytes, bytes | None]) -> None:
        if self._paused_because:
            return
        self.commits += 1
        try:
            self._journal.commit(changes)
            if DEVICES in changes:
                self._lines = None
        except JournalFull as error:
            _logger.warning("the journal of this guest is full: %s", error)
            self.pause(f"its journal was full: {error}")
            self._full(str(error))

    def _after(self, answers: Sequence[GivenAnswer]) -> dict[bytes, bytes | None]:
        return {ANSWERS: ANSWERS_VALUE.build(Answers(self._parts.gateway.posts.tail, tuple(answers)))}

    def _guest(self, ready: dict[tuple[int, int], int]) -> dict[bytes, bytes | None]:
        parts = self._parts
        # The TSC before the time that is saved with the partition: restored from both, time does not go back.
        tsc = parts.clock.stopped_at or parts.clock.guest_tsc()
        partition = parts.partition.save()
        self._vps = len(partition.vps)
        hypervisor = SavedHypervisor(
            offered=self._offered,
            tsc=tsc,
            tsc_frequency=parts.clock.tsc_frequency,
            answers=tuple(SavedAnswer(*each) for each in parts.gateway.carried()),
            partition=partition,
        )
        if (bus := parts.bus.save()) != self._bus:
            self._bus, self._built_bus = bus, SAVED_BUS.build(bus)
        changes: dict[bytes, bytes | None] = {
            ABOUT: ABOUT_VALUE.build(About(FORM, self._resets)),
            HYPERVISOR: SAVED_HYPERVISOR.build(hypervisor),
            BUS: self._built_bus,
            TIMERS: self._timers(),
            MARKS: MARKS_VALUE.build(
                Marks(tuple(SlotMark(vp, sint, mark) for (vp, sint), mark in ready.items()))
            ),
        }
        if self._lines is not None:
            changes[DEVICES] = self._lines
        changes.update(self._changed_channels())
        return changes

    def _timers(self) -> bytes:
        timers = self._parts.partition.synthetic_timers
        return TIMERS_VALUE.build(
            Timers(
                tuple(
                    Timer(
                        each.config,
                        each.count,
                        NO_EXPIRATION if each.expiration is None else each.expiration,
                    )
                    for vp in timers.vps[: self._vps]
                    for each in vp
                )
            )
        )

    def _changed_channels(self) -> dict[bytes, bytes | None]:
        changes: dict[bytes, bytes | None] = {}
        there: dict[bytes, tuple[object, ...]] = {}
        self._known = self._parts.state.channels()
        for each in self._known:
            channel, io = each.channel, each.io
            key = channel_key(each.identity)
            there[key] = (
                io,
                io.state,
                io.failure,
                channel.state,
                channel.relid,
                channel.counters.opens,
                tuple(channel.gpadls),
            )
            if self._seen.get(key) != there[key]:
                changes[key] = self._channel(each)
        changes.update({key: None for key in self._seen if key not in there})
        self._seen = there
        return changes

    def _changed_device(
        self, channel: DeviceChannel, channels: Sequence[DeviceChannel]
    ) -> dict[bytes, bytes | None]:
        """Return the change of the primary channel, which has the device's state, if a sub-channel changed that."""
        if not channel.identity.subchannel_index:
            return {}
        identity = replace(channel.identity, subchannel_index=0)
        for each in channels:
            if each.identity == identity:
                key = channel_key(identity)
                state = self._device(each)
                unchanged = state is not None and state == self._devices.get(key)
                return {} if unchanged else {key: self._channel(each)}
        return {}

    def _device(self, channel: DeviceChannel) -> bytes | None:
        try:
            return channel.captured_device()
        except VmbusError:  # which is told when the whole channel is asked
            return None

    def _channel(self, channel: DeviceChannel) -> bytes | None:
        """Return the value of a channel, or ``None`` if its device cannot say it."""
        self._devices.pop(channel_key(channel.identity), None)
        try:
            state = channel.captured()
        except VmbusError as error:
            _logger.warning(
                "what %s does is lost if this emulator is killed: %s", channel.io.device.name, error
            )
            return None
        if not channel.identity.subchannel_index:
            self._devices[channel_key(channel.identity)] = state.device
        positions = channel.io.positions
        chunks = encode_all(
            (
                (
                    kind,
                    SavedOutgoing(SAVED_PACKET.build(record.packet), record.device)
                    if isinstance(record, OutgoingPacket)
                    else record,
                )
                for kind, record in state.records()
            ),
            save_id=_SAVE_ID,
        )
        read, write = positions if positions is not None else (0, 0)
        link = channel.io.fast_link
        links = () if link is None else (Link(*link),)
        return CHANNEL_VALUE.build(ChannelValue(int(positions is not None), read, write, links, chunks))
