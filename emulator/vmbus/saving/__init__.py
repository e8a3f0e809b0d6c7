"""Saving and restoring of channels and of whole machines; depends neither on QEMU nor on an event loop.

``channel`` has the KMCL functions for one channel (begin, continue, end, restore), ``state`` the protocol that a
channel implements for them, ``device_channel`` the implementation for channels of the bus. ``stream`` saves a whole
machine and ``loading`` restores it. Declarations are in :mod:`vmbus.wire.saved`.
"""

from vmbus.saving.channel import ChannelSaver, SaveResult
from vmbus.saving.loading import MachineState, Restore, SectionTarget, read_machine
from vmbus.saving.state import (
    ChannelState,
    OutgoingPacket,
    Packet,
    RestorePacket,
    SavableChannel,
    SavePacket,
    SavePacketResult,
)
from vmbus.saving.status import NtStatus, Reason, StateRefused
from vmbus.saving.stream import SavedState, refusal_stream, save_machine

__all__ = [
    "ChannelSaver",
    "ChannelState",
    "MachineState",
    "NtStatus",
    "OutgoingPacket",
    "Packet",
    "Reason",
    "Restore",
    "RestorePacket",
    "SavableChannel",
    "SavePacket",
    "SavePacketResult",
    "SaveResult",
    "SavedState",
    "SectionTarget",
    "StateRefused",
    "read_machine",
    "refusal_stream",
    "save_machine",
]
