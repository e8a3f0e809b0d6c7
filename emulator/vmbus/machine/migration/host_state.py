"""All of a host as one state: paused, saved, restored, resumed.

    running ──pause──▶ paused ──save──▶ paused ──resume──▶ running          (a migration that failed: as before)
    fresh ───pause──▶ paused ──restore──▶ paused ──resume──▶ running        (the target, before its guest runs)

Paused: no write of guest memory, no interrupt, no completion; traps are still answered. After a resume, both
directions of every channel are signalled once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.state import ChannelState as BusChannelState
from vmbus.bus.io.channel_io import ChannelDevice, ChannelIo
from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.bus.io.state import RingPositions
from vmbus.bus.saved_state.layout import SAVED_BUS
from vmbus.bus.saved_state.restore import BusStateRefused, check_state
from vmbus.bus.saved_state.values import BusState, ChannelRecord
from vmbus.bus.server import Bus
from vmbus.errors import MalformedError, TooNewError, VmbusError
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.partition import Partition
from vmbus.hypervisor.reference_time import TscScaling, scale_for
from vmbus.hypervisor.saved_state.restore import MAX_TIME
from vmbus.machine.gateway.traps import Unclaimed
from vmbus.machine.memory import MappedMemory
from vmbus.machine.migration import carried_pages, lost_channels, shared_memory
from vmbus.machine.migration.dirty_pages import owned_bytes
from vmbus.machine.migration.hypervisor_layout import SAVED_HYPERVISOR, SavedAnswer, SavedHypervisor
from vmbus.machine.migration.ports import GuestService, PausableClock, TrapAnswers
from vmbus.saving import (
    ChannelSaver,
    ChannelState,
    MachineState,
    NtStatus,
    Reason,
    Restore,
    SavedState,
    StateRefused,
    read_machine,
    save_machine,
)
from vmbus.saving.chunks import MAX_IGNORED
from vmbus.saving.device_channel import DeviceChannel
from vmbus.saving.loading import not_there
from vmbus.saving.state import SavableChannel
from vmbus.saving.stream import BUFFER_SIZE, STREAM_LIMIT, begin_channels, cancel_channels
from vmbus.wire.codec import Record
from vmbus.wire.packet import Packet
from vmbus.wire.saved import RECORDS, ChannelIdentity, SavedSection

_logger = logging.getLogger(__name__)

_CHANNEL_BYTES = 1024
"""Bytes that a channel has in a state, of itself and of the bus's record of it, without what is counted for it."""
_SMALL_BYTES = 256 << 10
"""Bytes of a state that fits whatever carries it, with pages and what is not counted (messages, processors)."""

_T = TypeVar("_T")


def _other_version(section: SavedSection, version: int) -> str:
    upgrade = "; upgrade this emulator to the release that wrote it" if section.version > version else ""
    return f"{section.name} of version {section.version}, this emulator reads version {version}{upgrade}"


def _parse_section(record: Record[_T], section: SavedSection) -> _T:
    try:
        found, ignored = record.parse_all(section.state)
    except TooNewError as error:
        upgrade = "upgrade this emulator to the release that wrote it"
        raise TooNewError(error.reason, f"{error.detail}; {upgrade}") from error
    if ignored:
        numbers = ", ".join(map(str, ignored[:MAX_IGNORED]))
        _logger.warning(
            "the %s section has fields of a later release, which are ignored: %s", section.name, numbers
        )
    return found


class HypervisorSection:
    """The partition, its clock and the unclaimed answers of the gateway, as a section of a state."""

    name = "hypervisor"
    version = 1

    def __init__(self, partition: Partition, clock: PausableClock, gateway: TrapAnswers) -> None:
        self._partition = partition
        self._clock = clock
        self._gateway = gateway
        self._last: tuple[bytes, SavedHypervisor] | None = None
        self._checked: SavedHypervisor | None = None
        self.same_host = False
        """Whether the state comes from this host: its TSC is this one, whatever its frequency was measured to be."""

    def _parsed(self, section: SavedSection) -> SavedHypervisor:
        """Return the section's record. Parsing takes milliseconds, and a section is checked and then applied."""
        if self._last is None or self._last[0] != section.state:
            self._last = (section.state, _parse_section(SAVED_HYPERVISOR, section))
        return self._last[1]

    def save(self, *, machine_stays: bool = False) -> SavedSection:
        """Return the section of the paused host; ``machine_stays``: for another process that serves the same QEMU."""
        answers = self._gateway.carried() if machine_stays else self._gateway.unclaimed()
        saved = SavedHypervisor(
            offered=offered(self._partition.features),
            tsc=self._clock.stopped_at or 0,
            tsc_frequency=self._clock.tsc_frequency,
            answers=tuple(SavedAnswer(*answer) for answer in answers),
            partition=self._partition.save(),
        )
        return SavedSection(self.name, self.version, SAVED_HYPERVISOR.build(saved))

    def check_restore(self, section: SavedSection, channels: Sequence[ChannelState]) -> str | None:
        if (section.name, section.version) != (self.name, self.version):
            return _other_version(section, self.version)
        try:
            saved = self._parsed(section)
            self._partition.check_state(saved.partition)
            self._checked = saved
        except MalformedError as error:
            return str(error)
        if saved.tsc_frequency and not scale_for(saved.tsc_frequency):
            return f"a guest whose TSC has {saved.tsc_frequency} Hz"
        if (seen := _time_seen(saved)) >= MAX_TIME:
            return f"a guest that has read the reference time {seen}"
        here = offered(self._partition.features)
        if saved.offered != here:
            differing = ", ".join(sorted(set(saved.offered) ^ set(here)))
            return f"the guest was offered other features of Hyper-V than this emulator offers: {differing}"
        return None

    def apply_restore(self, section: SavedSection) -> None:
        saved = self._parsed(section)
        same = self._clock.restore(
            saved.tsc_frequency,
            saved.tsc,
            _time_seen(saved),
            saved.partition.time.time,
            same_host=self.same_host,
        )
        self._partition.restore(saved.partition, checked=self._checked is saved)
        if not same:  # the guest reads the counter MSR until its TSC is known here
            self._partition.publish_reference_tsc()
        self._gateway.carry(
            Unclaimed(answer.identity, answer.verdict, answer.value) for answer in saved.answers
        )


def _time_seen(saved: SavedHypervisor) -> int:
    """Return the last reference time that the guest has seen, also by computing it from its TSC."""
    time = saved.partition.time
    if not time.frequency or not saved.tsc:
        return time.time
    return max(time.time, TscScaling(time.frequency, time.scale, time.offset).time(saved.tsc))


class BusSection:
    """The bus, as a section of a state."""

    name = "bus"
    version = 1

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._last: tuple[bytes, BusState] | None = None
        self._checked: BusState | None = None

    def _parsed(self, section: SavedSection) -> BusState:
        if self._last is None or self._last[0] != section.state:
            self._last = (section.state, _parse_section(SAVED_BUS, section))
        return self._last[1]

    def save(self) -> SavedSection:
        """Return the section of the paused host."""
        return SavedSection(self.name, self.version, SAVED_BUS.build(self._bus.save()))

    def check_restore(self, section: SavedSection, channels: Sequence[ChannelState]) -> str | None:
        if (section.name, section.version) != (self.name, self.version):
            return _other_version(section, self.version)
        bus = self._bus
        try:
            state = self._parsed(section)
            check_state(state, bus.limits, bus.memory, bus.synic.vp_count)
            self._checked = state
        except (MalformedError, BusStateRefused) as error:
            return str(error)
        is_open = {
            ChannelIdentity(*channel.key)
            for channel in state.channels
            if channel.state is BusChannelState.OPEN
        }
        for each in channels:
            if (each.channel.open is not None) != (each.channel.identity in is_open):
                return (
                    f"channel {each.channel.identity} is open in one of channel and bus, and not in the other"
                )
        return None

    def open_channels(self, section: SavedSection | None) -> set[ChannelIdentity]:
        """Return the channels that are open in ``section``; none if it cannot be read, which a check refuses."""
        return {
            ChannelIdentity(*each.key)
            for each in self._channels(section)
            if each.state is BusChannelState.OPEN
        }

    def revoked_channels(self, section: SavedSection | None) -> set[ChannelIdentity]:
        """Return the channels that were taken away, and that the guest has not released: no device has them."""
        channels = self._channels(section)
        there = {ChannelIdentity(*each.key) for each in channels if not each.revoking}
        return {ChannelIdentity(*each.key) for each in channels if each.revoking} - there

    def _channels(self, section: SavedSection | None) -> tuple[ChannelRecord, ...]:
        try:
            return self._parsed(section).channels if section is not None else ()
        except MalformedError:
            return ()

    def apply_restore(self, section: SavedSection) -> None:
        state = self._parsed(section)
        self._bus.restore(state, checked=self._checked is state)


def offered(features: Features) -> tuple[str, ...]:
    """Return the features as names, for comparison with those of another emulator."""
    found = []
    for field in dataclasses.fields(features):
        value = getattr(features, field.name)
        if value is True:
            found.append(field.name)
        elif value is not False:
            found.append(f"{field.name}={value}")
    return tuple(found)


def _compile_records() -> None:
    """Compile the records now, and not while a guest stands still."""
    records: list[Record[Any]] = [SAVED_BUS, SAVED_HYPERVISOR]
    records.extend(each for kind in RECORDS.values() for each in kind.values())
    for record in records:
        record.compiled  # noqa: B018 - compiled on first access


class StateJournal(Protocol):
    """What is told of the state as a whole; see :class:`vmbus.machine.journal.recorder.Recorder`."""

    def pause(self, reason: str) -> None:
        """Say that nothing can be taken over, until :meth:`begin`."""

    def begin(self) -> None:
        """Record everything, from now on."""


class HostState:
    """The state of one host as a whole."""

    def __init__(
        self,
        *,
        partition: Partition,
        bus: Bus,
        memory: MappedMemory,
        clock: PausableClock,
        gateway: TrapAnswers,
        service: GuestService,
    ) -> None:
        self._partition = partition
        self._bus = bus
        self._memory = memory
        self._clock = clock
        self._gateway = gateway
        self._service = service
        self._saver = ChannelSaver()
        self._channels: dict[Channel, DeviceChannel] = {}
        self._held: set[DeviceChannel] = set()
        self._begun: list[SavableChannel] | None = None
        """The channels that :meth:`begin_save` began to save."""
        self._hypervisor_section = HypervisorSection(partition, clock, gateway)
        self._bus_section = BusSection(bus)
        self.paused = False
        self.journal: StateJournal | None = None
        """The journal of the guest, which is not valid while another state takes the place of its state."""
        _compile_records()

    @property
    def saver(self) -> ChannelSaver:
        """The save contexts of the channels."""
        return self._saver

    def channels(self) -> tuple[DeviceChannel, ...]:
        """Return the channels that a device serves, in the order of their offers."""
        return tuple(self._known())

    def hold_channel(self, channel: DeviceChannel) -> NtStatus:
        """VmbChannelPause by hand: one channel, until :meth:`start_channel`, whatever is resumed meanwhile."""
        status = self._saver.pause(channel)
        if status == NtStatus.STATUS_SUCCESS:
            self._held.add(channel)
        return status

    def start_channel(self, channel: DeviceChannel) -> NtStatus:
        """VmbChannelStart by hand, after :meth:`hold_channel`."""
        status = self._saver.start(channel)
        if status == NtStatus.STATUS_SUCCESS:
            self._held.discard(channel)
        return status

    def held_by_hand(self) -> list[str]:
        """Return the names of the channels that :meth:`hold_channel` has paused."""
        self._known()
        return [channel.io.device.name for channel in self._held]

    def _known(self) -> list[DeviceChannel]:
        """Return the channels that a device serves, in the order of their offers."""
        there = [each for each in self._bus.channels if isinstance(each.endpoint, ChannelIo)]
        self._channels = {
            channel: self._channels.get(channel) or DeviceChannel(self._saver, channel, channel.endpoint)  # type: ignore[arg-type]
            for channel in there
        }
        self._held.intersection_update(self._channels.values())
        return list(self._channels.values())

    def names(self) -> dict[ChannelIdentity, str]:
        """Return the names of the channels' devices."""
        return {channel.identity: channel.io.device.name for channel in self._known()}

    def unclaimed_answers(self) -> int:
        """Return the number of answers to traps that no vCPU has fetched: the state has them."""
        return len(self._gateway.unclaimed())

    def owned_bytes(self) -> dict[int, int]:
        """Return the bytes that only the host writes now (:mod:`~vmbus.machine.migration.dirty_pages`)."""
        return owned_bytes(
            self._bus.connection.monitor_pages,
            self._bus.channels,
            self._partition.synic.vps,
            self._partition.reference_tsc,
        )

    def begin_paused(self) -> None:
        """Pause a host that serves nothing yet: another process does, and its gateway is not to be touched."""
        self.paused = True
        self.pause()

    def pause_channels(self) -> None:
        """Take no more packets; work under way may end. The guest is stopped, or has not run yet."""
        self._clock.stop()
        if not self.paused:
            self.paused = True
            self._service.serve_gateway()
        for end in self._known():  # of a paused host: those of devices that were added since
            self._saver.pause(end)
        for channel in self._channels:
            channel.pause()

    def pause(self) -> None:
        """Pause everything. The guest is stopped, or has not run yet; no work is under way.

        Interrupts that were posted may still be on their way to QEMU.
        """
        self.pause_channels()
        self._bus.pause()
        self._partition.pause()

    def resume(self) -> None:
        """Resume everything, from where it was paused or from what was restored."""
        if not self.paused:
            return
        self.paused = False
        self.abandon_save()
        self._partition.resume()
        self._bus.resume()
        for end in self._known():
            if end in self._held:
                self._saver.save_cancel(end)
            else:
                self._saver.start(end)
        for channel in tuple(self._channels):
            channel.resume()
        if self.journal is not None:
            self.journal.begin()

    def begin_save(self) -> bool:
        """Have every channel of the paused host take its view, which :meth:`save` writes; all devices are asked here.

        Return whether it is certain that the state is small. Raises :class:`~vmbus.saving.StateRefused`.
        """
        self.abandon_save()
        known = self._known()
        for end in known:  # a guest that stays stopped keeps what was seen of it at the save before
            self._saver.save_cancel(end)
        self._begun = begin_channels(self._saver, known)
        budget = self._bus.budget
        counted = budget.saved_packets + budget.saved_gpadls + _CHANNEL_BYTES * len(known)
        return counted + sum(end.device_bytes for end in known) <= _SMALL_BYTES

    def abandon_save(self) -> None:
        """Undo :meth:`begin_save`, if nothing was saved since."""
        begun, self._begun = self._begun, None
        if begun is not None:
            cancel_channels(self._saver, begun)

    def save(
        self,
        buffer_size: int = BUFFER_SIZE,
        *,
        memory_stays: bool = False,
        machine_stays: bool = False,
        pages: Sequence[int] = (),
        limit: int = STREAM_LIMIT,
    ) -> SavedState:
        """Return the state of the paused host, at most ``limit`` bytes; the rest of what :meth:`begin_save` began.

        ``buffer_size``: bytes of the buffer that channels are saved into at first. ``memory_stays``: the target maps
        the same memory. ``machine_stays``: another process will serve the same QEMU, which may run meanwhile.
        ``pages``: addresses of pages of guest memory that the state carries, as many as fit.

        Raises :class:`~vmbus.saving.StateRefused`.
        """
        if self._begun is None:
            self.begin_save()
        begun, self._begun = self._begun, None
        memory = shared_memory.describe(self._memory, self._bus.channels) if memory_stays else None
        return save_machine(
            self._saver,
            begun or (),
            begun=True,
            hypervisor=self._hypervisor_section.save(machine_stays=machine_stays),
            bus=self._bus_section.save(),
            memory=memory,
            pages=carried_pages.read(self._memory, pages),
            buffer_size=buffer_size,
            limit=limit,
        )

    def release_devices(self) -> None:
        """Have the devices of a guest that was saved, and leaves, release what its next process uses."""
        for device in self._devices():
            try:
                device.guest_saved()
            except Exception:
                _logger.exception("internal error: %s cannot be released; please report this", device.name)

    def restore(self, data: bytes, *, allow_missing: bool = False, machine_stays: bool = False) -> None:
        """Restore a saved state; the host stays paused.

        ``allow_missing``: channels whose device is not offered here are revoked when the host is resumed.
        ``machine_stays``: as in :meth:`save`.

        Raises :class:`~vmbus.saving.StateRefused`, before anything has changed unless a device refused.
        """
        state = self._read(data)
        if state.ignored:
            _logger.warning(
                "the state was written by %s, and has parts that this release does not know and may ignore: %s",
                state.writer[:64],
                "; ".join(state.ignored),
            )
        if state.memory is not None:
            shared_memory.check(state.memory, self._memory)
        if self.journal is not None:
            self.journal.pause("another state was being restored when its emulator was killed")
        from_here = state.memory is not None and state.memory.boot == shared_memory.boot_id()
        self._hypervisor_section.same_host = from_here or machine_stays
        self._apply(state, allow_missing=allow_missing)

    def restore_recovered(
        self,
        state: MachineState,
        positions: Mapping[ChannelIdentity, RingPositions],
        again: Mapping[ChannelIdentity, Sequence[Packet]],
        lost: Mapping[ChannelIdentity, str],
    ) -> None:
        """Restore what a journal has of this machine's guest; the host stays paused.

        ``positions``: where the emulator of before stood in the rings, of each channel that had any. ``again``:
        packets that it had taken, besides those of the state. ``lost``: channels that cannot be read, and why; those
        that are not there, and those that their devices refuse, are lost, too. When the host is resumed, the channels
        of a device that has lost one are rescinded and offered anew. Raises :class:`~vmbus.saving.StateRefused`,
        before anything has changed.
        """
        self._hypervisor_section.same_host = True
        state = self._without_revoked(state)
        revoked = self._bus_section.revoked_channels(state.bus)
        lost = {
            **lost_channels.without_state(state, self._bus_section.open_channels(state.bus) - revoked),
            **{channel: reason for channel, reason in lost.items() if channel not in revoked},
        }
        found = dict(lost)
        state = lost_channels.without_devices_of(state, lost)
        self._apply(state, allow_missing=True, positions=positions, again=again, lost=found)
        self._lose(found)

    def _read(self, data: bytes) -> MachineState:
        return self._without_revoked(read_machine(data))

    def _without_revoked(self, state: MachineState) -> MachineState:
        """Leave out channels that the bus goes on to take away by itself: they are not offered again."""
        revoked = self._bus_section.revoked_channels(state.bus)
        kept = tuple(each for each in state.channels if each.identity not in revoked)
        return dataclasses.replace(state, channels=kept) if revoked else state

    def _apply(
        self,
        state: MachineState,
        *,
        allow_missing: bool,
        positions: Mapping[ChannelIdentity, RingPositions] | None = None,
        again: Mapping[ChannelIdentity, Sequence[Packet]] | None = None,
        lost: dict[ChannelIdentity, str] | None = None,
    ) -> None:
        made = self._make_subchannels(state)
        for channel in self._known():
            channel.positions = positions.get(channel.identity) if positions else None
        if again and lost is not None:
            state = self._with_taken(state, again, lost)
        restore = self._restore(allow_missing=allow_missing, lost=lost)
        try:
            restore.apply(state)
        except StateRefused as error:
            if not error.changed:
                self._revoke_subchannels(made)
            raise
        there = set(map(lost_channels.device_of, self.names()))
        gone = [each for each in lost or () if lost_channels.device_of(each) not in there]
        if missing := [*restore.missing(state), *gone]:
            self._service.report_missing_devices(missing)

    def _with_taken(
        self,
        state: MachineState,
        again: Mapping[ChannelIdentity, Sequence[Packet]],
        lost: dict[ChannelIdentity, str],
    ) -> MachineState:
        """Return ``state`` with packets that its channels have to execute again, without the devices that cannot."""
        there = {channel.identity: channel for channel in self._known()}
        channels = list(state.channels)
        for at, saved in enumerate(channels):
            if (packets := again.get(saved.identity)) and (channel := there.get(saved.identity)) is not None:
                try:
                    found = channel.taken_again(saved.state, packets)
                except VmbusError as error:
                    lost[saved.identity] = str(error)
                    continue
                channels[at] = dataclasses.replace(saved, state=found)
        return lost_channels.without_devices_of(dataclasses.replace(state, channels=tuple(channels)), lost)

    def _lose(self, lost: Mapping[ChannelIdentity, str]) -> None:
        """Have the bus rescind the channels of devices of which one is in ``lost``, and offer them anew."""
        reasons: dict[str, str] = {}
        devices = lost_channels.devices_of(lost)
        for channel in self._known():
            if (reason := devices.get(lost_channels.device_of(channel.identity))) is not None:
                self._saver.disable(channel)
                channel.channel.lost = True
                reasons[channel.io.device.name] = reason
        if reasons:
            self._service.report_lost_channels(reasons)

    def check(self, data: bytes, *, allow_missing: bool = False) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` if ``data`` could not be restored, once guest memory is here."""
        state = self._read(data)
        made = self._make_subchannels(state)
        try:
            self._restore(allow_missing=allow_missing).check(state)
        finally:
            self._revoke_subchannels(made)

    def bound_to_process(self) -> list[str]:
        """Return what the guest has written and what ends with this process, of all devices."""
        return [name for device in self._devices() for name in device.bound_to_process()]

    def outside_snapshots(self) -> list[str]:
        """Return what the guest can write to and a snapshot does not hold, of all devices."""
        return [name for device in self._devices() for name in device.outside_snapshots()]

    def snapshot_disks(self) -> dict[str, SnapshotDisk]:
        """Return the disks that snapshots take in, of all devices."""
        return {name: disk for device in self._devices() for name, disk in device.snapshot_disks().items()}

    def _devices(self) -> list[ChannelDevice]:
        return list({id(channel.io.device): channel.io.device for channel in self._known()}.values())

    def check_fits(self, data: bytes, *, allow_missing: bool = False) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` if ``data`` could not be restored in place of the guest here.

        The guest may run; nothing is changed.
        """
        state = self._read(data)
        there = {channel.identity: channel for channel in self._known()}
        for saved in state.channels:
            primary = there.get(dataclasses.replace(saved.identity, subchannel_index=0))
            if primary is None:
                if allow_missing:
                    continue
                raise not_there(saved.identity)
            if (refused := primary.check_restore(saved.state)) is not None:
                raise StateRefused(Reason.NOT_ACCEPTED, f"channel {saved.identity}: {refused}")
        states = [saved.state for saved in state.channels]
        found: list[str | None] = []
        if state.hypervisor is not None:
            found.append(self._hypervisor_section.check_restore(state.hypervisor, states))
        if state.bus is not None:
            found.append(self._bus_section.check_restore(state.bus, states))
        for why in found:
            if why:
                raise StateRefused(Reason.NOT_ACCEPTED, why)

    def _restore(self, *, allow_missing: bool, lost: dict[ChannelIdentity, str] | None = None) -> Restore:
        return Restore(
            self._saver,
            self._known(),
            hypervisor=self._hypervisor_section,
            bus=self._bus_section,
            memory=carried_pages.CarriedPages(self._memory),
            allow_missing=allow_missing,
            lost=lost,
        )

    def check_memory(self, data: bytes) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` if memory that was not copied changed since the save."""
        saved = read_machine(data).memory
        if saved is not None:
            shared_memory.check(saved, self._memory)

    def _make_subchannels(self, state: MachineState) -> list[Channel]:
        """Offer the sub-channels of ``state``, and return them.

        A device offers sub-channels when its guest asks for them; the guest of ``state`` did that elsewhere.
        """
        there = {channel.identity: channel for channel in self._known()}
        made = []
        for saved in sorted(state.channels, key=lambda saved: saved.identity.subchannel_index):
            identity = saved.identity
            primary = there.get(dataclasses.replace(identity, subchannel_index=0))
            if identity in there or primary is None:
                continue  # the check refuses a channel whose primary is missing, or leaves it out
            io = self._service.channel_end(primary.io.device)
            offer = dataclasses.replace(primary.channel.offer, subchannel_index=identity.subchannel_index)
            channel = self._bus.offer(offer, io)
            channel.pause()
            io.pause()
            primary.io.subchannels.append(io)
            made.append(channel)
        return made

    def _revoke_subchannels(self, made: Sequence[Channel]) -> None:
        """Undo :meth:`_make_subchannels`."""
        ends = [channel.endpoint for channel in made]
        for channel in self._known():
            channel.io.subchannels[:] = [io for io in channel.io.subchannels if io not in ends]
        for each in made:
            self._bus.revoke(each)

    def reset(self) -> None:
        """Drop all that belongs to the guest, without a write of its memory: another state follows."""
        self.abandon_save()
        if self.journal is not None:
            self.journal.pause("another state was about to be loaded when its emulator was killed")
        self._service.reset()
        self._held.clear()
        for channel in self._known():
            self._saver.disable(channel)
