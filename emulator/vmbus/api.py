"""Everything that a device is made from, under one name. Device authors import from here, and from nowhere else.

    from vmbus.api import Channel, Device, GuestError, Offer, Packet, Record

``docs/devices.md`` is the tutorial, ``docs/api.md`` lists every name. All other modules of ``vmbus``, apart from
:mod:`vmbus.testing`, are private and may change in any release.
"""

from __future__ import annotations

from vmbus.bus.channel.gpadl import Gpadl, GpadlState
from vmbus.bus.io.channel_io import ChannelIo as Channel
from vmbus.bus.io.device import ControlCommand, Device, DeviceEnvironment
from vmbus.bus.io.guest_buffer import GuestBuffer
from vmbus.bus.io.snapshots import DiskSnapshot, SnapshotDisk
from vmbus.bus.io.state import PacketState
from vmbus.bus.offers import Offer, pipe_area
from vmbus.devices.histogram import Histogram
from vmbus.devices.joined import Joinable, Whole
from vmbus.devices.line import join_device, split_device
from vmbus.devices.options import Help, Option, options_of
from vmbus.devices.parts import HasParts, NoticesRemoval, Part
from vmbus.devices.registry import Registry
from vmbus.devices.saved import SavedState
from vmbus.errors import (
    DeviceError,
    GuestAddressError,
    GuestError,
    InternalError,
    MalformedError,
    ProtocolError,
    RingError,
    UsageError,
    UserError,
    VmbusError,
)
from vmbus.ports import PAGE_SIZE, GuestMemory, TimerHandle, Timers, Workers, WritableMemory
from vmbus.wire.codec import Record
from vmbus.wire.offer import OfferFlags, PipeMode
from vmbus.wire.optional import OptionalField
from vmbus.wire.packet import GpaRange, Packet, PacketType, TransferPages, TransferRange

__all__ = [
    "PAGE_SIZE",
    "Channel",
    "ControlCommand",
    "Device",
    "DeviceEnvironment",
    "DeviceError",
    "DiskSnapshot",
    "GpaRange",
    "Gpadl",
    "GpadlState",
    "GuestAddressError",
    "GuestBuffer",
    "GuestError",
    "GuestMemory",
    "HasParts",
    "Help",
    "Histogram",
    "InternalError",
    "Joinable",
    "MalformedError",
    "NoticesRemoval",
    "Offer",
    "OfferFlags",
    "Option",
    "OptionalField",
    "Packet",
    "PacketState",
    "PacketType",
    "Part",
    "PipeMode",
    "ProtocolError",
    "Record",
    "Registry",
    "RingError",
    "SavedState",
    "SnapshotDisk",
    "TimerHandle",
    "Timers",
    "TransferPages",
    "TransferRange",
    "UsageError",
    "UserError",
    "VmbusError",
    "Whole",
    "Workers",
    "WritableMemory",
    "join_device",
    "options_of",
    "pipe_area",
    "split_device",
]
