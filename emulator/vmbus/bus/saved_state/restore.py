"""Checks of a saved state of the bus, and live objects from its values (docs/protocol/saving.md#bus-state).

A state comes from a file or another process, and may be damaged or malicious: the whole of it is checked like a
guest's message, before anything changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from vmbus.bus.channel.endpoint import EndpointChannel
from vmbus.bus.channel.gpadl import (
    MAX_ASSEMBLIES,
    MAX_CHANNEL_GPADLS,
    MAX_CHANNEL_PAGES,
    MAX_CONNECTION_GPADLS,
    MAX_CONNECTION_PAGES,
    RANGE_WEIGHT,
    Assembly,
    Gpadl,
    GpadlState,
    check_ram,
)
from vmbus.bus.channel.opening import OpenRequest, split_rings
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import (
    MULTICLIENT_CONNECTION_ID,
    SINT_COUNT,
    Connection,
    Limits,
    NextAction,
    Phase,
)
from vmbus.bus.offers import CONNECTION_ID_BASE, MAX_CONNECTION_ID, MAX_RELID
from vmbus.bus.outbox import Target
from vmbus.bus.saved_state.values import (
    AssemblyRecord,
    BusState,
    ChannelRecord,
    ConnectionRecord,
    GpadlRecord,
)
from vmbus.errors import DeviceError, GuestAddressError, GuestError, VmbusError
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.wire.gpadl import PFN_LIMIT, GpaRange, pages_of_range
from vmbus.wire.header import MAX_MESSAGE
from vmbus.wire.monitor import MONITOR_COUNT
from vmbus.wire.version import Feature, Version

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel

MAX_RANGE_BYTES = 0xFFFF
"""A range buffer length has 16 bits."""

_WITH_REQUEST = {
    ChannelState.OPENING,
    ChannelState.OPEN,
    ChannelState.CLOSING,
    ChannelState.CLOSING_REOPEN,
}


class BusStateRefused(VmbusError):
    """A saved state that this bus cannot restore; ``reason`` is a stable name.

    ``unsupported-version``, ``unsupported-features``, ``features-before-6.0``: this bus does not support what was
    agreed with the guest. ``monitor-pages``: the server-specified monitor pages differ. ``not-ram``: the state names
    pages that are not RAM here. ``not-fresh``: this bus has a guest already. ``inconsistent``: the state contradicts
    itself.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def check_state(state: BusState, limits: Limits, memory: GuestMemory, vp_count: int) -> None:
    """Raise :class:`BusStateRefused` unless ``state`` can be restored."""
    _check_limits(state)
    _check_connection(state.connection, limits, memory, vp_count)
    relids = {channel.relid for channel in state.channels if channel.relid is not None}
    for channel in state.channels:
        _check_channel(channel, state.connection, limits, memory, vp_count)
    _unique("channel id", [each.relid for each in state.channels if each.relid is not None])
    _unique("monitor id", [each.monitor_id for each in state.channels if each.monitor_id is not None])
    _unique("device", [each.key for each in state.channels if not each.revoking])
    _unique("connection id", _signal_ids(state))
    _unique("GPADL in progress", [each.gpadl_id for each in state.assemblies])
    for assembly in state.assemblies:
        _check_assembly(assembly, relids)
    for message in state.inbox:
        _consistent(len(message.payload) <= MAX_MESSAGE, "a message that is too long")
    for outgoing in state.outbox:
        _consistent(0 < len(outgoing.payload) <= MAX_MESSAGE, "an answer that is too long")
        _check_target(outgoing.target, vp_count)


def restored_connection(record: ConnectionRecord) -> Connection:
    """Return the connection of a checked record."""
    return Connection(*(getattr(record, field.name) for field in dataclasses.fields(Connection)))


def restored_gpadl(record: GpadlRecord) -> Gpadl:
    """Return the GPADL of a checked record."""
    ranges = tuple(GpaRange.of_runs(each.byte_count, each.byte_offset, each.runs) for each in record.ranges)
    state = GpadlState.TEARING_DOWN if record.tearing_down else GpadlState.ACCEPTED
    return Gpadl(record.gpadl_id, ranges, state, record.device_notified)


def restored_assembly(record: AssemblyRecord) -> Assembly:
    """Return the assembly of a checked record."""
    return Assembly(
        record.relid, record.gpadl_id, record.capacity, record.range_count, bytearray(record.data)
    )


class AbsentDevice:
    """The endpoint of a restored channel until its device is offered here; it fails every open."""

    def opened(self, channel: EndpointChannel) -> None:
        raise DeviceError("the device of this restored channel is not offered here")

    def closed(self, channel: EndpointChannel) -> None:
        """Nothing is open."""

    def signalled(self, channel: EndpointChannel) -> None:
        """Nothing is open."""

    def gpadl_created(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        """No page is used."""

    def gpadl_torn_down(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        """No page is used."""

    def retargeted(self, channel: EndpointChannel, vp: int) -> None:
        """Nothing interrupts."""


ABSENT_DEVICE = AbsentDevice()


def restore_channel(channel: Channel, record: ChannelRecord) -> None:
    """Put ``channel`` into the state of a checked record; its endpoint is called when the bus resumes."""
    channel.state = record.state
    channel.relid = record.relid
    channel.monitor_id = record.monitor_id
    channel.offered = record.offered
    channel.request = record.request
    channel.reopen = record.reopen
    channel.signals.target_vp = record.target_vp
    channel.signals.pending_target = record.pending_target
    channel.close_answer = record.close_answer
    channel.revoking = record.revoking
    channel.abandoned = record.abandoned
    channel.released_by_guest = record.released_by_guest
    if record.relid is not None:  # a released channel has no GPADLs
        for each in record.gpadls:
            channel.gpadl_list.restore(record.relid, restored_gpadl(each))


def _consistent(fine: bool, detail: str) -> None:
    if not fine:
        raise BusStateRefused("inconsistent", detail)


def _unique(what: str, numbers: Iterable[Hashable]) -> None:
    listed = list(numbers)
    _consistent(len(set(listed)) == len(listed), f"a {what} twice")


def _signal_ids(state: BusState) -> Iterable[int]:
    """Return every connection id on which the guest can signal a channel."""
    for channel in state.channels:
        if channel.relid is None:
            continue
        own = CONNECTION_ID_BASE | channel.relid
        yield own
        chosen = channel.request.connection_id if channel.request is not None else None
        if chosen is not None and chosen != own:
            yield chosen


def _check_target(target: Target, vp_count: int) -> None:
    _consistent(
        0 <= target.vp < vp_count and 0 <= target.sint < SINT_COUNT, f"VP {target.vp}, SINT {target.sint}"
    )


def _check_agreement(version: Version, features: Feature, limits: Limits, *, trusted: bool) -> None:
    if version not in limits.versions:
        raise BusStateRefused("unsupported-version", f"{version!s}, and {limits.max_version!s} is the limit")
    if features and version < Version.COPPER:
        raise BusStateRefused("features-before-6.0", f"{int(features):#x} in {version!s}")
    missing = features & ~limits.offered_features(trusted=trusted)
    if missing:
        raise BusStateRefused("unsupported-features", f"{int(missing):#x}")


def _check_connection(
    connection: ConnectionRecord, limits: Limits, memory: GuestMemory, vp_count: int
) -> None:
    _check_target(connection.target, vp_count)
    _check_next_action(connection)
    version, pages = connection.version, connection.monitor_pages
    if version is None:
        _consistent(connection.phase is not Phase.CONNECTED, "connected, and no version")
        _consistent(not connection.offers_sent, "offers sent without a connection")
        return
    _check_agreement(version, connection.features, limits, trusted=connection.trusted)
    _consistent(connection.phase is not Phase.DISCONNECTED, "a version, and no connection")
    own = Feature.SERVER_SPECIFIED_MONITOR_PAGES in connection.features
    if own and connection.phase is Phase.CONNECTED and pages != limits.monitor_pages:
        raise BusStateRefused("monitor-pages", f"{pages} and {limits.monitor_pages}")
    if pages is not None and not own:
        for page in (pages.parent_to_child, pages.child_to_parent):
            _check_page(page, memory)
    if connection.interrupt_page:
        _check_page(connection.interrupt_page, memory)


def _check_next_action(connection: ConnectionRecord) -> None:
    contact = connection.next_contact
    _consistent((connection.next_action is NextAction.CONTACT) == (contact is not None), "the next contact")
    leaving = connection.phase is Phase.DISCONNECTING
    _consistent(leaving or connection.next_action is NextAction.NONE, "an action after no disconnection")
    _consistent(not connection.paused or connection.phase is Phase.CONNECTED, "paused without a connection")


def _check_page(gpa: int, memory: GuestMemory) -> None:
    if gpa % PAGE_SIZE or not memory.is_ram(gpa, PAGE_SIZE):
        raise BusStateRefused("not-ram", f"page at {gpa:#x}")


def _check_channel(
    channel: ChannelRecord, connection: ConnectionRecord, limits: Limits, memory: GuestMemory, vp_count: int
) -> None:
    name = f"channel {channel.relid} ({channel.interface_id})"
    released = channel.state is ChannelState.RELEASED
    _consistent(released == (channel.relid is None), f"{name} is {channel.state.value}")
    _consistent(not released or not channel.gpadls, f"{name} is released and has GPADLs")
    _consistent(channel.relid is None or 1 <= channel.relid <= MAX_RELID, name)
    _consistent(channel.monitor_id is None or 0 <= channel.monitor_id < MONITOR_COUNT, f"{name}: monitor id")
    if channel.request is not None:
        _check_request(channel.request, name, limits, vp_count)
    _consistent(_has_its_requests(channel), f"{name}: open parameters")
    for vp in (channel.target_vp, channel.pending_target):
        _consistent(vp is None or 0 <= vp < vp_count, f"{name}: VP {vp}")
    if channel.close_answer is not None:
        _check_target(channel.close_answer, vp_count)
    _consistent(_can_leave(channel), f"{name} is {channel.state.value}, and leaves")
    reserved = channel.request is not None and channel.request.reserved is not None
    if connection.phase is Phase.DISCONNECTING:
        # The connection has ended when all of these are released: each must be on its way there.
        _consistent(released or reserved or channel.abandoned, f"{name} stays, and the connection ends")
    if connection.phase is Phase.DISCONNECTED:
        _consistent(released or reserved, f"{name} is {channel.state.value} without a connection")
    _unique(f"GPADL of {name}", [gpadl.gpadl_id for gpadl in channel.gpadls])
    gpadls = {record.gpadl_id: _check_gpadl(record, name, memory) for record in channel.gpadls}
    if channel.state is ChannelState.OPEN and channel.request is not None:
        try:
            split_rings(channel.request, gpadls)
        except GuestError as error:
            raise BusStateRefused("inconsistent", f"{name}: {error}") from error


def _can_leave(channel: ChannelRecord) -> bool:
    """Return whether state and reasons to leave agree: in each state, a channel leaves for some reasons only.

    From the others nothing would continue the departure after a restore.
    """
    state = channel.state
    if state is ChannelState.REVOKED:
        # The guest may have released it too early, before the RESCIND: it does so again.
        return not channel.abandoned
    if state is ChannelState.REOFFERED:
        return not channel.abandoned and not channel.released_by_guest
    if state is ChannelState.CLOSING:
        return True
    if state is ChannelState.OPENING:
        return not channel.released_by_guest
    return not (channel.abandoned or channel.released_by_guest or channel.revoking)


def _has_its_requests(channel: ChannelRecord) -> bool:
    """Return whether open requests and state agree.

    A channel that leaves stays ``closing`` after its device has closed, until all GPADLs are given back.
    """
    leaving = channel.abandoned or channel.revoking or channel.released_by_guest
    if channel.state is ChannelState.CLOSING and leaving:
        return channel.reopen is None
    if channel.reopen is not None and channel.reopen.reserved is not None:
        return False
    reopens = channel.state is ChannelState.CLOSING_REOPEN
    return (channel.state in _WITH_REQUEST) == (channel.request is not None) and reopens == (
        channel.reopen is not None
    )


def _check_request(request: OpenRequest, name: str, limits: Limits, vp_count: int) -> None:
    _consistent(request.target_vp is None or 0 <= request.target_vp < vp_count, f"{name}: VP")
    _consistent(request.event_flag is None or 0 <= request.event_flag <= MAX_RELID, f"{name}: event flag")
    chosen = request.connection_id
    _consistent(
        chosen is None or MULTICLIENT_CONNECTION_ID < chosen <= MAX_CONNECTION_ID, f"{name}: connection id"
    )
    if request.reserved is not None:
        _check_target(request.reserved.target, vp_count)
        trusted = Feature.CONFIDENTIAL_CHANNELS in request.reserved.features
        _check_agreement(request.reserved.version, request.reserved.features, limits, trusted=trusted)


def _check_gpadl(record: GpadlRecord, name: str, memory: GuestMemory) -> Gpadl:
    what = f"GPADL {record.gpadl_id:#x} of {name}"
    _consistent(bool(record.ranges), f"{what} is empty")
    for each in record.ranges:
        pages = sum(count for _, count in each.runs)
        _consistent(
            each.byte_count > 0
            and 0 <= each.byte_offset < PAGE_SIZE
            and pages == pages_of_range(each.byte_count, each.byte_offset)
            and pages <= MAX_CHANNEL_PAGES
            and all(first >= 0 and count > 0 and first + count <= PFN_LIMIT for first, count in each.runs),
            f"{what}: {each.byte_count} bytes at {each.byte_offset} in {pages} pages",
        )
    gpadl = restored_gpadl(record)
    try:
        check_ram(gpadl.ranges, memory)
    except GuestAddressError as error:
        raise BusStateRefused("not-ram", f"{what}: {error.detail}") from error
    return gpadl


def _check_assembly(assembly: AssemblyRecord, relids: set[int]) -> None:
    what = f"GPADL {assembly.gpadl_id:#x} in progress"
    _consistent(assembly.relid in relids, f"{what} of channel {assembly.relid}")
    _consistent(0 <= assembly.range_count <= 0xFFFF and assembly.capacity % 8 == 0, what)
    _consistent(
        len(assembly.data) < assembly.capacity <= MAX_RANGE_BYTES, f"{what}: {len(assembly.data)} bytes"
    )
    _consistent(len(assembly.data) % 8 == 0, f"{what}: half a word")


def _weight(record: GpadlRecord) -> int:
    """Return the ``Gpadl.weight`` of a record that is not checked yet, without expanding its page lists."""
    return sum(max(count, 0) for each in record.ranges for _, count in each.runs) + RANGE_WEIGHT * len(
        record.ranges
    )


def _check_limits(state: BusState) -> None:
    """Check the weights of all GPADLs together, before any page list is expanded from its runs."""
    weights: dict[int | None, list[int]] = {}
    for channel in state.channels:
        weights.setdefault(channel.relid, []).extend(_weight(gpadl) for gpadl in channel.gpadls)
    for assembly in state.assemblies:
        weights.setdefault(assembly.relid, []).append(restored_assembly(assembly).weight)
    _consistent(
        all(sum(each) <= MAX_CHANNEL_PAGES and len(each) <= MAX_CHANNEL_GPADLS for each in weights.values())
        and sum(sum(each) for each in weights.values()) <= MAX_CONNECTION_PAGES
        and sum(len(each) for each in weights.values()) <= MAX_CONNECTION_GPADLS
        and len(state.assemblies) <= MAX_ASSEMBLIES,
        "more GPADLs than a connection may have",
    )
