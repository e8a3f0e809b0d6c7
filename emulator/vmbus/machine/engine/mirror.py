"""What the mirror of an engine that has ended says about a channel: what its successor goes on with.

Source: docs/decisions/0006-native-data-path.md. The engine stores in this order, so one of these rows always holds:

    | the crash was before              | the mirror has                  | then                                     |
    | ``taken`` is stored               | slots with a later number       | they are void: their packets are in the  |
    |                                   |                                 | ring                                     |
    | the slot is DONE                  | a slot that is taken            | the request is made again                |
    | the ring's write index is stored  | answers, ``answered`` is the    | the answers are written                  |
    |                                   | ring's index                    |                                          |
    | ``answered`` is stored            | the same, and a ring that is    | the guest has as many of them as are in  |
    |                                   | ahead                           | the ring: the first ones                 |
    | the slots are free                | answers up to ``answered``      | they are void: the guest has them        |

Python has the rings in between, and records them in the journal. What the journal says of the channel was written
after a recall and before the next give, or while the channel was given: :class:`~vmbus.ports.FastLink`.

    | the mirror's record          | the journal    | positions | the journal's queue                               |
    | was given as often           | not given      | journal's | waits, or is in the ring: the write index says it |
    | was given as often           | given          | mirror's  | waits                                             |
    | was given once more          | not given      | mirror's  | is in the ring: else it had not been given        |
    | anything else                |                | refused   |                                                   |

Requests under way are in slots in all these cases, except those that the journal names: these are in it.

The memory is not this process's alone: everything in it is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from vmbus.bus.io.state import RingPositions
from vmbus.errors import MalformedError
from vmbus.machine.engine.layout import (
    MAGIC,
    MAX_ANSWER,
    MAX_CHANNELS,
    MAX_PACKET,
    MAX_SLOTS,
    VERSION,
    Mirror,
    MirrorChannel,
    MirrorSlot,
)
from vmbus.ports import FastLink

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

    positions: RingPositions | None
    """Where to go on in the rings; ``None``: the journal says it. The write index in the ring may be ahead."""
    queue_written: bool
    """Whether everything that the journal has in the channel's queue is in the ring."""
    packets: Sequence[bytes]
    """Packets without trailer that were taken and not done, in order: to be processed again."""
    answers: Sequence[bytes]
    """Completion packets without trailer, in order, of which the guest has as many as the ring is ahead."""


def later(number: int, than: int) -> bool:
    """Return whether a 32-bit sequence number comes after another."""
    return 0 < (number - than) & _MASK32 < 1 << 31


def recover(mirror: Mirror, link: FastLink) -> Recovered:
    """Return what the channel goes on with of which a journal says ``link``.

    Raises :class:`~vmbus.errors.MalformedError` for a mirror that no engine can have left.
    """
    header = mirror.header
    if (header.magic, header.version, header.epoch) != (MAGIC, VERSION, link.epoch):
        raise _malformed(
            f"magic {header.magic:#x}, version {header.version}, epoch {header.epoch}, expected {link.epoch}"
        )
    if (header.channels, header.slots) != (MAX_CHANNELS, MAX_SLOTS) or link.channel >= MAX_CHANNELS:
        raise _malformed(f"{header.channels} channels, {header.slots} slots, no. {link.channel} is asked for")
    record = mirror.channel[link.channel]
    since = (record.gives - link.gives) & _MASK32
    if since > 1 or (since and link.given):
        raise _malformed(f"given {record.gives} times, by the journal {link.gives}")
    engine_has_it = bool(since or link.given)
    if engine_has_it and record.opening != link.opening:
        raise _malformed(f"opening {record.opening} is given, by the journal it is {link.opening}")
    answered = record.answered >> 32
    packets: dict[int, bytes] = {}
    answers: dict[int, bytes] = {}
    for slot in mirror.slot:
        if slot.state == SlotState.FREE or (slot.channel, slot.opening) != (link.channel, link.opening):
            continue
        if slot.state not in (SlotState.TAKEN, SlotState.DONE, SlotState.PYTHON):
            raise _malformed(f"a slot in state {slot.state}")
        if slot.taken_number in link.adopted or later(slot.taken_number, record.taken >> 32):
            continue
        if slot.state != SlotState.DONE:
            _add(packets, slot.taken_number, _packet(slot))
        elif later(slot.done_number, answered):
            _add(answers, slot.done_number, _answer(slot))
    if answers and not engine_has_it:
        raise _malformed(f"{len(answers)} answers of a channel that it does not have")
    return Recovered(
        _positions(record) if engine_has_it else None,
        bool(since),
        _in_order(packets, record.taken >> 32),
        _in_order(answers, answered + (1 << 31) - 1),
    )


def _positions(record: MirrorChannel) -> RingPositions:
    found = RingPositions(record.taken & _MASK32, record.answered & _MASK32)
    if found.read & 7 or found.write & 7:
        raise _malformed(f"the indices {found.read:#x} and {found.write:#x}")
    return found


def _add(found: dict[int, bytes], number: int, data: bytes) -> None:
    if number in found:
        raise _malformed(f"two slots with the number {number}")
    found[number] = data


def _in_order(found: dict[int, bytes], last: int) -> list[bytes]:
    """Return what has numbers up to ``last``, the oldest first."""
    return [found[number] for number in sorted(found, key=lambda number: -((last - number) & _MASK32))]


def _packet(slot: MirrorSlot) -> bytes:
    if not 16 <= slot.size <= MAX_PACKET:
        raise _malformed(f"a packet of {slot.size} bytes")
    return bytes(slot.packet[: slot.size])


def _answer(slot: MirrorSlot) -> bytes:
    if not 16 <= slot.answer_size <= MAX_ANSWER or slot.answer_size % 8:
        raise _malformed(f"an answer of {slot.answer_size} bytes")
    return bytes(slot.answer[: slot.answer_size])


def _malformed(detail: str) -> MalformedError:
    return MalformedError("engine-mirror", detail)
