"""A guest with a storage driver, on a machine whose emulators are killed: every request is answered once, and right.

It looks at its rings only when it is interrupted, and has one request at a time for each place of the disk.
"""

from __future__ import annotations

import random
import struct
import time
from types import SimpleNamespace
from typing import Any

from vmbus.bus.messages import PostResult
from vmbus.ports import PAGE_SIZE
from vmbus.testing.loopback import COMPLETION, GuestPacket, gpa_direct_extension, guest_packet
from vmbus.wire.header import MessageType
from vmbus.wire.packet import PacketType
from vmbus.wire.version import NO_FEATURES

from tests.unit.engine.forked import LIMIT, ForkedMachine
from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.scsi.scsi_guest import (
    BEGIN,
    CREATE,
    END,
    IN,
    NONE,
    OUT,
    PROPERTIES,
    VERSION,
    build_srb,
    parse_answer,
)

PLACES = 40
BLOCKS = PAGE_SIZE // 512
_QUIET = 0.05
"""Seconds without any work after which the emulator has nothing to do."""


class DiskGuest(KilledGuest):
    """:meth:`start` boots it; :meth:`trade` sends some requests and takes some answers."""

    machine: ForkedMachine

    def __init__(self, machine: ForkedMachine, seed: int) -> None:
        super().__init__(machine)
        self.chance = random.Random(seed)
        self.relids: list[int] = []
        """Of the open channels, the primary one first."""
        self.next_id = 1
        self.content = [{bytes(PAGE_SIZE)} for _ in range(PLACES)]
        """What may be at each place of the disk."""
        self.waiting: dict[int, tuple[int, bytes | None]] = {}
        """Transaction id → its place, and what it writes there."""
        self.others: set[int] = set()
        """Requests that move no data."""
        self.answered = 0
        self._buffers: list[int] = []

    @property
    def bus(self) -> Any:
        return SimpleNamespace(connection=SimpleNamespace(features=NO_FEATURES))

    @bus.setter
    def bus(self, value: Any) -> None: ...

    def settle(self) -> None:
        """Run until the emulator sleeps, and stays asleep."""
        quiet, end = time.monotonic(), time.monotonic() + LIMIT
        while time.monotonic() - quiet < _QUIET:
            assert time.monotonic() < end, "there is no end of it"
            self.machine.run()
            if self.machine.interrupts or not self.machine.get("waiting"):
                quiet = time.monotonic()
            self.interrupted()

    def ask(self, payload: bytes, **more: Any) -> list[Any]:
        """Post a message, and wait for the host's, if it answers: it may wait for requests to end."""
        if int.from_bytes(payload[:4], "little") != MessageType.CLOSECHANNEL:
            assert self.post(payload, **more) is PostResult.OK
            self.machine.until(self._has_message, "an answer to a message")
            return [answer.message for answer in self.take()]
        return super().ask(payload, **more)

    def _has_message(self) -> bool:
        self.interrupted()
        return bool(self.synic.messages)

    def start(self, channels: int = 1) -> None:
        """Boot, and begin to use the disk."""
        self.boot()
        [offer] = self.connect()
        self._buffers = self.pages(PLACES)
        self._open(offer.relid)
        if channels == 1:
            return
        self._ask(CREATE, struct.pack("<H", channels - 1))
        for each in self.take():
            self.open_rings(each.message.relid, max_packet=80)
            self.relids.append(each.message.relid)
        assert len(self.relids) == channels

    def reopen(self) -> None:
        """Close the channel and open it again, whatever is under way."""
        [relid] = self.relids
        self.close(relid)
        self._open(relid)
        for place, data in self.waiting.values():
            if data is not None:
                self.content[place].add(data)
        self.waiting.clear()
        self.others.clear()

    def _open(self, relid: int) -> None:
        self.open_rings(relid, max_packet=80)
        self.relids = [relid]
        for operation, union in (
            (BEGIN, b""),
            (VERSION, struct.pack("<HH", 0x0602, 0)),
            (PROPERTIES, b""),
            (END, b""),
        ):
            self._ask(operation, union)

    def _ask(self, operation: int, union: bytes) -> None:
        packet = (struct.pack("<III", operation, 1, 0) + union).ljust(64, b"\0")
        assert self._send(packet) is not None
        self.machine.until(self._one_answer, "the handshake")

    def _one_answer(self) -> bool:
        self.interrupted()
        found = self.packets[self.relids[0]]
        if not found:
            return False
        [packet] = found
        assert struct.unpack_from("<III", packet.payload) == (1, packet_flags(packet), 0)
        found.clear()
        return True

    def _send(self, payload: bytes, ranges: Any = ()) -> int | None:
        """Send a packet if there is room; its transaction id."""
        packet = guest_packet(
            payload,
            kind=PacketType.GPA_DIRECT if ranges else PacketType.IN_BAND,
            transaction_id=self.next_id,
            completion_requested=True,
            extension=gpa_direct_extension(ranges) if ranges else b"",
        )
        relid = self.chance.choice(self.relids)
        pages = self.channels[relid].outgoing
        before = pages.load_u32(0)
        if self.channels[relid].writer.write(packet) is None:
            return None
        self.machine.fence()
        if not pages.load_u32(8) and pages.load_u32(4) == before:
            self.machine.ring(relid)
        self.next_id += 1
        return self.next_id - 1

    # --- requests ---

    def trade(self) -> None:
        """Send some requests, and take the answers that have come."""
        busy = {place for place, _ in self.waiting.values()}
        free = [place for place in range(PLACES) if place not in busy]
        self.chance.shuffle(free)
        for place in free[: self.chance.randrange(12)]:
            if self.chance.random() < 0.1:
                self._other()
            elif self.chance.random() < 0.5:
                self._transfer(place, None)
            else:
                self._transfer(place, self.chance.randbytes(64) * (PAGE_SIZE // 64))
        self.machine.run()
        self.take_answers()

    def _transfer(self, place: int, data: bytes | None) -> None:
        page = self._buffers[place]
        self.memory.write(page * PAGE_SIZE, data or b"\xee" * PAGE_SIZE)
        cdb = struct.pack(">BBIBHB", 0x28 if data is None else 0x2A, 0, place * BLOCKS, 0, BLOCKS, 0)
        direction = IN if data is None else OUT
        payload = build_srb(cdb, length=PAGE_SIZE, direction=direction)
        number = self._send(payload, [(PAGE_SIZE, 0, [page])])
        if number is not None:
            self.waiting[number] = place, data

    def _other(self) -> None:
        """TEST UNIT READY or SYNCHRONIZE CACHE: for Python."""
        cdb = bytes([self.chance.choice((0x00, 0x35))]).ljust(10, b"\0")
        number = self._send(build_srb(cdb, direction=NONE))
        if number is not None:
            self.others.add(number)

    def take_answers(self) -> None:
        """Check what has come with an interrupt."""
        self.interrupted()
        found = [packet for relid in self.relids for packet in self.packets[relid]]
        for relid in self.relids:
            self.packets[relid].clear()
        for packet in found:
            assert packet.kind == COMPLETION
            answer = parse_answer(packet)
            number = packet.transaction_id
            self.answered += 1
            if number in self.others:
                self.others.remove(number)
                continue
            assert answer.good, answer
            assert number in self.waiting, f"request {number} is answered twice, or was never sent"
            place, data = self.waiting.pop(number)
            there = self.memory.read(self._buffers[place] * PAGE_SIZE, PAGE_SIZE)
            if data is not None:
                self.content[place] = {data}
            assert there in self.content[place], f"place {place} of request {number}"
            self.content[place] = {there}

    def finish(self) -> None:
        """Wait for all answers, and read everything once more."""
        for _ in range(2):
            self.machine.until(self._all_answered, "the answers")
            for place in range(PLACES):
                self._transfer(place, None)
        self.machine.until(self._all_answered, "the answers at the end")

    def _all_answered(self) -> bool:
        self.take_answers()
        return not self.waiting and not self.others


def packet_flags(packet: GuestPacket) -> int:
    """Return the second word of a packet of the protocol, which hosts copy."""
    return int(struct.unpack_from("<I", packet.payload, 4)[0])
