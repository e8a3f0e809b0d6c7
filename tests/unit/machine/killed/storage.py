"""The storage driver of a guest whose emulator is killed."""

from __future__ import annotations

import struct
from typing import Any

from vmbus.ports import PAGE_SIZE
from vmbus.testing.loopback import COMPLETION, GPA_DIRECT, gpa_direct_extension, guest_packet

from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.scsi.scsi_guest import (
    BEGIN,
    CREATE,
    END,
    IN,
    OUT,
    PROPERTIES,
    RESET_BUS,
    VERSION,
    Answer,
    parse_answer,
)
from tests.unit.scsi.scsi_guest import build_srb as build

BLOCK = 512


class Storage:
    """The disk behind the channel ``relid``, and the channels of its controller that are open."""

    def __init__(self, guest: KilledGuest, relid: int) -> None:
        self.guest = guest
        self.relid = relid
        self.open(relid)
        self._next_id = 0
        self._buffers: dict[int, list[int]] = {}

    def open(self, relid: int) -> None:
        """Open a channel of the controller."""
        self.guest.open_rings(relid, max_packet=80)

    # --- the negotiation ---

    def negotiate(self, subchannels: int = 0) -> None:
        """Agree on a version, and ask for sub-channels."""
        assert self.ask(BEGIN) == 0
        assert self.ask(VERSION, struct.pack("<HH", 0x0602, 0)) == 0
        assert self.ask(PROPERTIES) == 0
        assert self.ask(END) == 0
        if subchannels:
            self.create_subchannels(subchannels)

    def create_subchannels(self, count: int) -> None:
        """Ask for sub-channels."""
        assert self.ask(CREATE, struct.pack("<H", count)) == 0

    def ask(self, operation: int, union: bytes = b"") -> int:
        """Return the status of a packet that is no command."""
        packet = (struct.pack("<III", operation, 1, 0) + union).ljust(64, b"\0")
        number = self._send(self.relid, packet)
        self.guest.settle()
        [answer] = self.guest.packets[self.relid]
        self.guest.packets[self.relid].clear()
        assert (answer.kind, answer.transaction_id) == (COMPLETION, number)
        return int(struct.unpack_from("<I", answer.payload, 8)[0])

    def reset(self) -> int:
        """Begin a reset of the bus; return its number."""
        return self._send(self.relid, struct.pack("<III", RESET_BUS, 1, 0).ljust(64, b"\0"))

    # --- commands ---

    def read(self, lba: int, blocks: int, relid: int | None = None) -> int:
        """Begin READ(10)."""
        return self.begin(
            struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0), read=blocks * BLOCK, relid=relid
        )

    def write(self, lba: int, data: bytes, relid: int | None = None) -> int:
        """Begin WRITE(10)."""
        return self.begin(
            struct.pack(">BBIBHB", 0x2A, 0, lba, 0, len(data) // BLOCK, 0), write=data, relid=relid
        )

    def begin(self, cdb: bytes, *, read: int = 0, write: bytes = b"", relid: int | None = None) -> int:
        """Send a command, with a buffer for what it reads, or with data; return its number."""
        length = len(write) or read
        pfns = self.guest.pages(-(-length // PAGE_SIZE))
        if write:
            self.guest.memory.write(pfns[0] * PAGE_SIZE, write)
        options: dict[str, Any] = {"kind": GPA_DIRECT} if length else {}
        if length:
            options["extension"] = gpa_direct_extension([(length, 0, pfns)])
        payload = build(cdb, length=length, direction=OUT if write else IN if read else 2)
        number = self._send(self.relid if relid is None else relid, payload, **options)
        self._buffers[number] = pfns
        return number

    def end(self, relid: int | None = None) -> dict[int, Answer]:
        """Return the answers that came through a channel since the last call, each once."""
        self.guest.settle()
        packets = self.guest.packets[self.relid if relid is None else relid]
        answers = [parse_answer(each) for each in packets]
        packets.clear()
        found = {each.transaction_id: each for each in answers}
        assert len(found) == len(answers), "an answer came twice"
        return found

    def data(self, answer: Answer) -> bytes:
        """Return what a command has read."""
        pfns = self._buffers[answer.transaction_id]
        return self.guest.memory.read(pfns[0] * PAGE_SIZE, answer.transferred)

    def do(
        self, cdb: bytes, *, read: int = 0, write: bytes = b"", relid: int | None = None
    ) -> tuple[tuple[int, int, int] | None, bytes]:
        """Execute a command alone; return the condition that it ended with, if any, and what it has read."""
        number = self.begin(cdb, read=read, write=write, relid=relid)
        answers = self.end(relid)
        assert list(answers) == [number]
        answer = answers[number]
        assert answer.good or answer.condition is not None
        return answer.condition, self.data(answer) if read else b""

    def _send(self, relid: int, payload: bytes, **more: Any) -> int:
        self._next_id += 1
        packet = guest_packet(payload, transaction_id=self._next_id, completion_requested=True, **more)
        assert self.guest.send(relid, packet)
        return self._next_id
