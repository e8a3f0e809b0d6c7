"""The target ``mirror``: what compiled code has left beside a journal, or anybody else, and what that says of it."""

from __future__ import annotations

import ctypes
import struct
import uuid

from vmbus.errors import DeviceError, GuestError
from vmbus.machine.engine.layout import (
    MAGIC,
    MAX_ANSWER,
    MAX_CHANNELS,
    MAX_PACKET,
    MAX_SLOTS,
    VERSION,
    Mirror,
)
from vmbus.machine.journal.recovery import continued
from vmbus.machine.journal.values import ChannelValue, Link
from vmbus.saving.state import ChannelState
from vmbus.wire.saved import ChannelAxes, ChannelIdentity, SavedChannel, SavedCompletion

_CHANNEL = 3
_NOBODY = ChannelIdentity(uuid.UUID(int=1), uuid.UUID(int=2), 0)
_STATE = ChannelState(SavedChannel(_NOBODY, ChannelAxes(0)), queue=(SavedCompletion(1, b"queued\0\0"),))
"""What the journal has of the channel: one answer in its queue."""
_OF_LINK = struct.Struct("<IIIIBH")
"""Epoch, channel, opening, gives, given, and a number that Python has taken over."""
_OF_CHANNEL = struct.Struct("<IIQQI")
_OF_SLOT = struct.Struct("<HIIIIIIH")
"""Its place, state, channel, opening, number taken, number done, sizes of packet and answer."""
_RIGHT = 1
"""Flag of an input: header, channel and opening are put right, so that more than a check is reached."""


def input_of(
    link: tuple[int, ...], channel: tuple[int, ...], *slots: tuple[tuple[int, ...], bytes], right: bool = True
) -> bytes:
    """Return an input. ``slots``: the fields of each, and its packet, or its answer if that has a size."""
    parts = [bytes([right]), _OF_LINK.pack(*link), _OF_CHANNEL.pack(*channel)]
    for fields, data in slots:
        parts += [_OF_SLOT.pack(*fields), data]
    return b"".join(parts)


class MirrorMemory:
    """One mirror; what the last input has stored there is cleared before the next."""

    def __init__(self) -> None:
        self._mirror = Mirror()
        self._used: list[int] = []
        self.accepted = 0
        """How many inputs were."""

    def __call__(self, data: bytes) -> None:
        link = self._fill(data.ljust(1 + _OF_LINK.size + _OF_CHANNEL.size, b"\0"))
        value = ChannelValue(1, 8, 16, (link,), b"")
        try:
            found, positions, packets = continued(value, _STATE, self._mirror)
        except (GuestError, DeviceError):
            return
        self.accepted += 1
        assert not positions.read & 7
        assert not positions.write & 7
        assert len(packets) + len(found.queue) <= MAX_SLOTS + 1
        assert all(packet.size <= MAX_PACKET + 8 for packet in packets)
        written = link.gives != self._mirror.channel[link.channel].gives
        assert found.queue[-1:] != _STATE.queue if written else found.queue[-1:] == _STATE.queue

    def _fill(self, data: bytes) -> Link:
        mirror = self._mirror
        for place in self._used:
            ctypes.memset(ctypes.addressof(mirror.slot[place]), 0, ctypes.sizeof(mirror.slot[place]))
        self._used.clear()
        right = data[0] & _RIGHT
        epoch, channel, opening, gives, given, adopted = _OF_LINK.unpack_from(data, 1)
        at = 1 + _OF_LINK.size
        fields = _OF_CHANNEL.unpack_from(data, at)
        at += _OF_CHANNEL.size
        header = mirror.header
        header.magic, header.version = MAGIC, VERSION
        header.channels, header.slots, header.epoch = MAX_CHANNELS, MAX_SLOTS, 7
        if right:
            epoch, channel = 7, _CHANNEL
        record = mirror.channel[channel % MAX_CHANNELS]
        record.owner, record.opening, record.taken, record.answered, record.gives = fields
        if right:
            opening = record.opening
        while len(data) - at >= _OF_SLOT.size:
            place, *values, answer_size = _OF_SLOT.unpack_from(data, at)
            at += _OF_SLOT.size
            slot = mirror.slot[place % MAX_SLOTS]
            self._used.append(place % MAX_SLOTS)
            slot.state, slot.channel, slot.opening, slot.taken_number, slot.done_number, slot.size = values
            slot.answer_size = answer_size
            if right:
                slot.channel, slot.opening = channel, opening
            field, size = (slot.answer, MAX_ANSWER) if answer_size else (slot.packet, MAX_PACKET)
            held = data[at : at + min(answer_size or slot.size, size)]
            ctypes.memmove(field, held, len(held))
            at += len(held)
        return Link(epoch, channel, opening, gives, given, (adopted,))
