"""Save and restore of channels and of the whole machine, without a machine: no QEMU, no event loop.

``channel`` is the contract for one channel (begin, continue, end, restore), ``state`` what a channel must be able
to do for it, ``stream`` and ``loading`` are the whole machine. Declarations are in :mod:`emulator.wire.saved`.
"""

from emulator.saving.channel import ChannelSaver, SaveResult
from emulator.saving.loading import MachineState, Restore, SectionTarget, read_machine
from emulator.saving.refusal import Reason, StateRefused
from emulator.saving.state import (
    ChannelState,
    OutgoingPacket,
    Packet,
    RestorePacket,
    SavableChannel,
    SavePacket,
    SavePacketResult,
)
from emulator.saving.status import NtStatus
from emulator.saving.stream import SavedState, refusal_stream, save_machine

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
