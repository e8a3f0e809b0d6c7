"""The target ``journal``: a memory that a killed emulator left, or anybody else."""

from __future__ import annotations

import mmap

from vmbus.machine.journal.store import Journal, JournalFull, JournalRefused, read
from vmbus.wire import journal as wire

from tests.unit.machine.journal.forged import INCARNATION

_AS_IT_IS = 1
"""Flag of an input: nothing in it is put right."""
_HALF = wire.half_size(wire.MIN_SIZE)
_HEADER = wire.JournalHeader(wire.MIN_SIZE, INCARNATION).summed()


def input_of(memory: bytes | bytearray, *, as_it_is: bool = False) -> bytes:
    """Return the input that :class:`JournalMemory` makes this memory of: the parts of it that are used."""
    first = bytes(memory[wire.PAGE : wire.PAGE + _HALF]).rstrip(b"\0")
    second = bytes(memory[wire.PAGE + _HALF :]).rstrip(b"\0")
    header = bytes(memory[: wire.JOURNAL_HEADER.size])
    return bytes([as_it_is]) + header + len(first).to_bytes(2, "little") + first + second


class JournalMemory:
    """Reads the smallest memory that a journal can have. What is accepted, a successor goes on with."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, wire.MIN_SIZE)
        self.accepted = 0
        """How many memories were."""

    def __call__(self, data: bytes) -> None:
        self._fill(data)
        try:
            found = read(self.memory)
        except JournalRefused as refused:
            assert refused.reason in ("empty", "foreign", "version", "truncated", "size", "damaged")
            return
        self.accepted += 1
        values = dict(found.values)
        assert len(values) <= wire.MAX_KEYS
        assert all(0 < len(key) <= wire.MAX_KEY for key in values)
        assert sum(map(len, values.values())) <= _HALF
        journal = Journal.resume(self.memory, found)
        try:
            for count in range(1, 12):
                changes = {b"fuzz": bytes(67 * count), next(iter(values), b"none"): None}
                try:
                    journal.commit(changes)
                except JournalFull:
                    pass
                else:
                    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
                again = read(self.memory)
                assert dict(again.values) == dict(journal.values) == values
                assert again.sequence == journal.sequence
        finally:
            journal.close()

    def _fill(self, data: bytes) -> None:
        """Make the memory of an input, with right checksums if that is not forbidden."""
        flags, header, body = data[:1], data[1 : 1 + wire.JOURNAL_HEADER.size], data[33:]
        size = min(int.from_bytes(body[:2], "little"), _HALF)
        halves = body[2 : 2 + size], body[2 + size :][:_HALF]
        memory = bytearray(wire.MIN_SIZE)
        right = not (flags and flags[0] & _AS_IT_IS)
        header = wire.JOURNAL_HEADER.build(_HEADER) if right else header
        memory[: len(header)] = header
        for index, half in enumerate(halves):
            start = wire.PAGE + index * _HALF
            memory[start : start + len(half)] = half
            if right:
                _sum(memory, start, start + _HALF)
        self.memory[:] = bytes(memory)


def _sum(memory: bytearray, at: int, end: int) -> None:
    """Give records their marks, as far as each has a possible length, and a mark without a zero at either end."""
    incarnation = wire.incarnation_sum(_HEADER.incarnation)
    while end - at >= wire.RECORD_SIZE and memory[at] and memory[at + wire.MARK_SIZE - 1]:
        length = wire.SUMMED_STRUCT.unpack_from(memory, at + wire.MARK_SIZE)[1]
        if not wire.RECORD_SIZE <= length <= end - at:
            return
        mark = wire.mark_of(bytes(memory[at + wire.MARK_SIZE : at + length]), incarnation)
        memory[at : at + wire.MARK_SIZE] = mark.to_bytes(wire.MARK_SIZE, "little")
        at += length
