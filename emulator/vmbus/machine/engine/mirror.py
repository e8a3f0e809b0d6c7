"""What the mirror of an engine that has ended says about a channel: what its successor goes on with.

Source: docs/decisions/0006-native-data-path.md. The engine stores in this order, so one of these rows always holds:

    | the crash was before              | the mirror has                   | then                                    |
    | ``taken`` is stored               | slots with a later number        | they are void: their packets are in the |
    |                                   |                                  | ring                                    |
    | the slot is DONE                  | a slot that is taken             | the request is made again               |
    | the ring's write index is stored  | ``next`` beyond the ring's index | the answers are written again           |
    | ``answered`` is stored            | ``next`` at the ring's index     | the guest has the answers               |

The memory is not this process's alone: everything in it is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from vmbus.errors import MalformedError
from vmbus.machine.engine.layout import MAGIC, MAX_ANSWER, MAX_PACKET, VERSION, Mirror, MirrorSlot, Owner

_MASK32 = 0xFFFFFFFF


class SlotState(IntEnum):
    """``enum request_state``."""

    FREE = 0
    TAKEN = 1
    UNDER_WAY = 2
    DONE = 3
    PYTHON = 4


@dataclass(frozen=True, slots=True)
class Recovered:
    """A channel, as of the last moment of its engine."""

    in_index: int
    """Read index of the incoming ring, to go on from; the one in the ring may be behind."""
    out_index: int
    """Write index of the outgoing ring."""
    packets: Sequence[bytes]
    """Packets without trailer that were taken and not done, in order: to be processed again."""
    answers: Sequence[bytes]
    """Completion packets without trailer that the guest does not have, in order."""


def later(number: int, than: int) -> bool:
    """Return whether a 32-bit sequence number comes after another."""
    return 0 < (number - than) & _MASK32 < 1 << 31


def recover(mirror: Mirror, channel: int, write_index: int, sizes: tuple[int, int]) -> Recovered | None:
    """Return what channel number ``channel`` goes on with; ``None`` if Python had it, which knew that itself.

    ``write_index``: the outgoing ring's, as it is in the ring. ``sizes``: bytes of data of both rings. Raises
    :class:`~vmbus.errors.MalformedError` for a mirror that no engine can have left.
    """
    header, record = mirror.header, mirror.channel[channel]
    if header.magic != MAGIC or header.version != VERSION:
        raise MalformedError("engine-mirror", f"magic {header.magic:#x}, version {header.version}")
    if record.owner == Owner.PYTHON:
        return None
    in_index, taken = record.taken & _MASK32, record.taken >> 32
    out_index, answered = record.answered & _MASK32, record.answered >> 32
    next_index, next_answered = record.next & _MASK32, record.next >> 32
    if write_index == next_index and later(next_answered, answered):
        out_index, answered = next_index, next_answered
    if write_index != out_index:
        raise MalformedError("engine-mirror", f"write index {write_index:#x}, expected {out_index:#x}")
    for index, size in zip((in_index, out_index), sizes, strict=True):
        if index >= size or index & 7:
            raise MalformedError("engine-mirror", f"index {index:#x} of {size:#x} bytes")
    packets: list[tuple[int, bytes]] = []
    answers: list[tuple[int, bytes]] = []
    for slot in mirror.slot:
        state = slot.state
        if state == SlotState.FREE or slot.channel != channel or slot.opening != record.opening:
            continue
        if state == SlotState.DONE:
            if later(slot.done_number, answered):
                answers.append((slot.done_number, _answer(slot)))
        elif not later(slot.taken_number, taken):
            packets.append((slot.taken_number, _packet(slot)))
    packets.sort(key=lambda each: (each[0] - taken) & _MASK32 or 1 << 32)
    answers.sort(key=lambda each: (each[0] - answered) & _MASK32)
    return Recovered(in_index, out_index, [each for _, each in packets], [each for _, each in answers])


def _packet(slot: MirrorSlot) -> bytes:
    if not 16 <= slot.size <= MAX_PACKET:
        raise MalformedError("engine-mirror", f"a packet of {slot.size} bytes")
    return bytes(slot.packet[: slot.size])


def _answer(slot: MirrorSlot) -> bytes:
    if not 16 <= slot.answer_size <= MAX_ANSWER or slot.answer_size % 8:
        raise MalformedError("engine-mirror", f"an answer of {slot.answer_size} bytes")
    return bytes(slot.answer[: slot.answer_size])
