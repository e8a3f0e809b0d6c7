"""All of a host as one state: frozen, saved, restored, thawed.

    running ──freeze──▶ frozen ──save──▶ frozen ──thaw──▶ running          (a migration that failed: as before)
    fresh ───freeze──▶ frozen ──restore──▶ frozen ──thaw──▶ running        (the target, before its guest runs)

Frozen: no write of guest memory, no interrupt, no completion; traps are still answered. A thaw kicks both
directions of every channel once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.state import ChannelState as BusChannelState
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.saved_state.layout import SAVED_BUS
from vmbus.bus.saved_state.restore import BusStateRefused, check_state
from vmbus.bus.saved_state.values import BusState
from vmbus.errors import MalformedError
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.reference_time import TscScaling
from vmbus.machine.gateway.traps import Unclaimed
from vmbus.machine.migration import carried_pages, shared_memory
from vmbus.machine.migration.hypervisor_layout import SAVED_HYPERVISOR, SavedAnswer, SavedHypervisor
from vmbus.saving import (
    ChannelSaver,
    ChannelState,
    MachineState,
    Restore,
    SavedState,
    StateRefused,
    read_machine,
    save_machine,
)
from vmbus.saving.device_channel import DeviceChannel
from vmbus.saving.state import forget_parsed
from vmbus.saving.stream import BUFFER_SIZE, STREAM_LIMIT
from vmbus.wire.codec import Record
from vmbus.wire.saved import RECORDS, ChannelIdentity, SavedSection, parse_record

if TYPE_CHECKING:
    from vmbus.machine.host import Host

_logger = logging.getLogger(__name__)


class HypervisorSection:
    """The hypervisor part, its clock and what the gateway has answered, as a section of a state."""

    name = "hypervisor"
    version = 1

    def __init__(self, host: Host) -> None:
        self._host = host
        self._last: tuple[bytes, SavedHypervisor] | None = None
        #: The state comes from this host: the TSC is the same one, whatever its frequency was measured to be.
        self.same_host = False

    def _parsed(self, section: SavedSection) -> SavedHypervisor:
        """Parsing takes milliseconds, and the same section is checked and then applied."""
        if self._last is None or self._last[0] != section.state:
            self._last = (section.state, parse_record(SAVED_HYPERVISOR, section.state))
        return self._last[1]

    def save(self) -> SavedSection:
        host = self._host
        saved = SavedHypervisor(
            offered=offered(host.partition.features),
            tsc=host.clock.stopped_at or 0,
            tsc_frequency=host.clock.tsc_frequency,
            answers=tuple(SavedAnswer(*answer) for answer in host.gateway.unclaimed()),
            partition=host.partition.save(),
        )
        return SavedSection(self.name, self.version, SAVED_HYPERVISOR.build(saved))

    def check_restore(self, section: SavedSection, channels: Sequence[ChannelState]) -> str | None:
        if (section.name, section.version) != (self.name, self.version):
            return f"{section.name} of version {section.version}, this emulator reads version {self.version}"
        try:
            saved = self._parsed(section)
            self._host.partition.check_state(saved.partition)
        except MalformedError as error:
            return str(error)
        here = offered(self._host.partition.features)
        if saved.offered != here:
            differing = ", ".join(sorted(set(saved.offered) ^ set(here)))
            return f"the guest was offered other features of Hyper-V than this emulator offers: {differing}"
        return None

    def apply_restore(self, section: SavedSection) -> None:
        host = self._host
        saved = self._parsed(section)
        time = saved.partition.time
        now = time.time
        if time.frequency and saved.tsc:  # what a guest that computes time itself has seen
            now = max(now, TscScaling(time.frequency, time.scale, time.offset).time(saved.tsc))
        same = host.clock.restore(saved.tsc_frequency, saved.tsc, now, time.time, same_host=self.same_host)
        host.partition.restore(saved.partition)
        if not same:  # the guest asks for the time until its TSC is known here
            host.partition.publish_reference_tsc()
        host.gateway.carry(
            Unclaimed(answer.identity, answer.verdict, answer.value) for answer in saved.answers
        )


class BusSection:
    """The bus, as a section of a state."""

    name = "bus"
    version = 1

    def __init__(self, host: Host) -> None:
        self._host = host
        self._last: tuple[bytes, BusState] | None = None

    def _parsed(self, section: SavedSection) -> BusState:
        if self._last is None or self._last[0] != section.state:
            self._last = (section.state, parse_record(SAVED_BUS, section.state))
        return self._last[1]

    def save(self) -> SavedSection:
        return SavedSection(self.name, self.version, SAVED_BUS.build(self._host.bus.save()))

    def check_restore(self, section: SavedSection, channels: Sequence[ChannelState]) -> str | None:
        if (section.name, section.version) != (self.name, self.version):
            return f"{section.name} of version {section.version}, this emulator reads version {self.version}"
        bus = self._host.bus
        try:
            state = self._parsed(section)
            check_state(state, bus.limits, bus.memory, bus.synic.vp_count)
        except (MalformedError, BusStateRefused) as error:
            return str(error)
        is_open = {
            ChannelIdentity(*channel.key)
            for channel in state.channels
            if channel.state is BusChannelState.OPEN
        }
        for each in channels:
            if (each.channel.open is not None) != (each.channel.identity in is_open):
                return f"channel {each.channel.identity} is open for one, and not for the other"
        return None

    def apply_restore(self, section: SavedSection) -> None:
        self._host.bus.restore(self._parsed(section))


def offered(features: Features) -> tuple[str, ...]:
    """The features as names, to be compared with those of another emulator."""
    found = []
    for field in dataclasses.fields(features):
        value = getattr(features, field.name)
        if value is True:
            found.append(field.name)
        elif value is not False:
            found.append(f"{field.name}={value}")
    return tuple(found)


def _compile_records() -> None:
    """What is read and written while a guest stands still is not compiled then."""
    records: list[Record[Any]] = [SAVED_BUS, SAVED_HYPERVISOR]
    records.extend(each for kind in RECORDS.values() for each in kind.values())
    for record in records:
        record.compiled  # noqa: B018 - made when it is looked at


class HostState:
    """Freezes, saves, restores and thaws one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._saver = ChannelSaver()
        self._channels: dict[Channel, DeviceChannel] = {}
        self._hypervisor = HypervisorSection(host)
        self._bus = BusSection(host)
        self.frozen = False
        _compile_records()

    def _known(self) -> list[DeviceChannel]:
        """The channels that a device serves, in the order of their offers."""
        there = [each for each in self._host.bus.channels if isinstance(each.endpoint, ChannelIo)]
        self._channels = {
            channel: self._channels.get(channel) or DeviceChannel(self._saver, channel, channel.endpoint)  # type: ignore[arg-type]
            for channel in there
        }
        return list(self._channels.values())

    def names(self) -> dict[ChannelIdentity, str]:
        """The names of the channels' devices."""
        return {channel.identity: channel.io.device.name for channel in self._known()}

    def hold(self) -> None:
        """Take no more packets; work that is under way may end. The guest is stopped, or has not run yet."""
        if self.frozen:
            return
        self.frozen = True
        self._host.serve_gateway()
        for channel in self._known():
            self._saver.pause(channel)

    def freeze(self) -> None:
        """Stand still. The guest is stopped, or has not run yet; no work is under way."""
        self.hold()
        self._host.bus.pause()
        self._host.partition.pause()
        self._host.qtest.settle()

    def thaw(self) -> None:
        """Go on, where it was frozen or from what was restored."""
        if not self.frozen:
            return
        self.frozen = False
        self._host.partition.resume()
        self._host.bus.resume()
        for channel in self._known():
            self._saver.start(channel)

    def save(
        self,
        buffer_size: int = BUFFER_SIZE,
        *,
        memory_stays: bool = False,
        pages: Sequence[int] = (),
        limit: int = STREAM_LIMIT,
    ) -> SavedState:
        """The state of a frozen host, of at most ``limit`` bytes; ``memory_stays``: the target maps the same memory.

        ``pages``: addresses of pages of guest memory that go along, as many of them as there is room for.

        Raises :class:`~vmbus.saving.StateRefused`.
        """
        memory = shared_memory.describe(self._host.memory, self._host.bus.channels) if memory_stays else None
        return save_machine(
            self._saver,
            self._known(),
            hypervisor=self._hypervisor.save(),
            bus=self._bus.save(),
            memory=memory,
            pages=carried_pages.read(self._host.memory, pages),
            buffer_size=buffer_size,
            limit=limit,
        )

    def restore(self, data: bytes) -> None:
        """Be in a saved state, frozen. Raises :class:`~vmbus.saving.StateRefused`, before anything changed
        unless a device refused.
        """
        state = read_machine(data)
        if state.memory is not None:
            shared_memory.check(state.memory, self._host.memory)
        self._hypervisor.same_host = state.memory is not None and state.memory.boot == shared_memory.boot_id()
        made = self._make_subchannels(state)
        restore = self._restore()
        try:
            restore.apply(state)
        except StateRefused as error:
            if not error.changed:
                for channel in made:
                    self._host.bus.revoke(channel)
            raise
        finally:
            forget_parsed()

    def check(self, data: bytes) -> None:
        """Whether ``data`` could be restored, once guest memory is here. Raises
        :class:`~vmbus.saving.StateRefused`.
        """
        state = read_machine(data)
        made = self._make_subchannels(state)
        try:
            self._restore().check(state)
        finally:
            for channel in made:
                self._host.bus.revoke(channel)

    def _restore(self) -> Restore:
        memory = carried_pages.CarriedPages(self._host.memory)
        return Restore(self._saver, self._known(), hypervisor=self._hypervisor, bus=self._bus, memory=memory)

    def check_memory(self, data: bytes) -> None:
        """Raises :class:`~vmbus.saving.StateRefused` if memory that was not copied changed since the save."""
        saved = read_machine(data).memory
        if saved is not None:
            shared_memory.check(saved, self._host.memory)

    def _make_subchannels(self, state: MachineState) -> list[Channel]:
        """A device offers sub-channels when its guest asks; the guest of ``state`` did that elsewhere."""
        there = {channel.identity: channel for channel in self._known()}
        made = []
        for saved in sorted(state.channels, key=lambda saved: saved.identity.subchannel_index):
            identity = saved.identity
            primary = there.get(dataclasses.replace(identity, subchannel_index=0))
            if identity in there or primary is None:
                continue  # if it is missing altogether, the check says so
            io = self._host.channel_end(primary.io.device)
            offer = dataclasses.replace(primary.channel.offer, subchannel_index=identity.subchannel_index)
            channel = self._host.bus.offer(offer, io)
            channel.pause()
            primary.io.subchannels.append(io)
            made.append(channel)
        return made

    def forget(self) -> None:
        """Drop all that belongs to the guest, without touching its memory: another state is about to come."""
        host = self._host
        host.reset()
        for channel in self._known():
            self._saver.disable(channel)
