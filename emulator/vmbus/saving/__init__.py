"""Save and restore of channels and of the whole machine, without a machine: no QEMU, no event loop.

``channel`` is the contract for one channel (begin, continue, end, restore), ``state`` what a channel must be able
to do for it, ``stream`` and ``loading`` are the whole machine. Declarations are in :mod:`vmbus.wire.saved`.
"""

from vmbus.saving.channel import ChannelSaver, SaveResult
from vmbus.saving.loading import MachineState, Restore, SectionTarget, read_machine
from vmbus.saving.refusal import Reason, StateRefused
from vmbus.saving.state import (
    ChannelState,
    OutgoingPacket,
    Packet,
    RestorePacket,
    SavableChannel,
    SavePacket,
    SavePacketResult,
)
from vmbus.saving.status import NtStatus
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
