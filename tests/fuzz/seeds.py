"""Write the seeds of guided fuzzing: valid inputs, from which the fuzzer starts.

python -m tests.fuzz.seeds
"""

from __future__ import annotations

import errno
import struct
import uuid
from typing import Any

from vmbus.bus.messages import PostResult
from vmbus.machine.engine.mirror import SlotState
from vmbus.testing.loopback import COMPLETION, guest_packet
from vmbus.testing.scripted import ForgetfulEndpoint, ScriptedGuest, an_offer
from vmbus.wire import gateway as wire
from vmbus.wire.frame import build_frame
from vmbus.wire.journal import ENTRY_SIZE, MARK_SIZE, MIN_SIZE, RECORD_SIZE, half_size

from tests.fuzz import compiled
from tests.fuzz.journal import input_of
from tests.fuzz.mirror import input_of as mirror_input
from tests.fuzz.targets import CORPUS, STATES
from tests.unit.machine.journal.forged import entry, memory_with, record
from tests.unit.nbd.nbd_server import (
    block_size_info,
    chunk,
    export_info,
    greeting,
    option_reply,
    simple_reply,
)


def states() -> dict[str, bytes]:
    """Return the stored states of machines."""
    return {path.stem: path.read_bytes() for path in sorted(STATES.glob("*.bin"))}


def negotiations() -> dict[str, bytes]:
    """Return what servers send that have structured replies, that have not, and that refuse."""
    info = option_reply(7, 3, export_info(1 << 20, 0x1ED)) + option_reply(
        7, 3, block_size_info(1, 4096, 1 << 20)
    )
    agreed = (
        option_reply(8, 1)
        + option_reply(10, 4, struct.pack(">I", 1) + b"base:allocation")
        + option_reply(10, 1)
    )
    return {
        "structured": greeting() + agreed + info + option_reply(7, 1),
        "simple": greeting() + option_reply(8, (1 << 31) + 1) + info + option_reply(7, 1),
        "refused": greeting() + agreed + option_reply(7, (1 << 31) + 6, b"no such export"),
    }


def replies() -> dict[str, bytes]:
    """Return answers to the requests 1 (read), 2 (status), 3 (write) and 4 (flush)."""
    data = bytes(range(256)) * 16
    place = struct.pack(">Q", 0)
    status = struct.pack(">IIIII", 7, 2048, 0, 2048, 3)
    return {
        "simple": b"\0" + simple_reply(1) + data + simple_reply(3) + simple_reply(4),
        "structured": b"\3" + chunk(1, 1, place + data[:2048], 0) + chunk(1, 2, struct.pack(">QI", 2048, 2048))
        + chunk(2, 5, status) + simple_reply(3) + simple_reply(4, 5),
        "errors": b"\3" + chunk(1, 0x8001, struct.pack(">IH", 5, 3) + b"bad") + simple_reply(2, 22),
    }  # fmt: skip


def requests() -> dict[str, bytes]:
    """Return StorVSP packets as :func:`tests.fuzz.targets.storvsp` reads them."""

    def srb(cdb: bytes, length: int, direction: int, lun: int = 0) -> bytes:
        body = struct.pack("<HBBBBBBBBBBI", 52, 0, 0, 0, 0, 0, lun, len(cdb), 20, direction, 0, length)
        return struct.pack("<III", 3, 1, 0) + (body + cdb.ljust(20, b"\0")).ljust(52, b"\0")

    def packet(payload: bytes, ranges: int = 0, pages: tuple[int, ...] = ()) -> bytes:
        head = bytes([ranges])
        for _ in range(ranges):
            head += struct.pack("<HBHB", 4096, 0, 0, len(pages)) + b"".join(
                struct.pack("<H", each) for each in pages
            )
        return head + bytes([len(payload)]) + payload

    def one(cdb: bytes, length: int, direction: int, lun: int = 0, page: int = 28) -> bytes:
        return packet(srb(cdb, length, direction, lun), 1, (page,))

    read, write = b"\x28" + bytes(7) + b"\x08\0", b"\x2a" + bytes(7) + b"\x08\0"
    return {
        "read-write": b"\0" + one(write, 4096, 0) + one(read, 4096, 1, page=29),
        "inquiry": b"\0" + one(b"\x12\x01\x83\0\xff\0", 255, 1) + packet(srb(bytes(6), 0, 2)),
        "sense": b"\0" + one(b"\x1a\0\x3f\0\xff\0", 255, 1) + one(b"\xa0" + bytes(11), 64, 1),
        "disc": b"\0" + one(b"\x46" + bytes(11), 512, 1, 1) + one(b"\x43" + bytes(9), 64, 1, 1),
        "before-negotiation": b"\1" + packet(struct.pack("<III", 7, 1, 0).ljust(64, b"\0")),
    }


def messages() -> dict[str, bytes]:
    """Return what a guest posts that connects, opens a channel, closes it and leaves."""
    posted: list[bytes] = []

    class Recorder(ScriptedGuest):
        def post(self, payload: bytes, **more: Any) -> PostResult:
            posted.append(payload)
            return super().post(payload, **more)

    guest = Recorder.on_fakes(vp_count=2, memory_size=1 << 18)
    guest.bus.offer(an_offer("device-0", instance=1), ForgetfulEndpoint())
    offers = guest.connect()
    relid = offers[0].relid
    guest.open_channel(relid)
    guest.close(relid)
    guest.unload()
    whole = b"".join(bytes([len(each)]) + each for each in posted)
    return {"life": b"\0" + whole, "connected": b"\1" + whole}


def gateways() -> dict[str, bytes]:
    """Return an answer and a region of one vCPU."""
    size = 1 << 16
    region = bytearray(size)
    fields = {
        "magic": wire.MAGIC, "version": wire.VERSION, "vcpus_max": 1, "region_size": size, "vcpu_offset": 4096,
        "request_offset": 8192, "doorbell_offset": 12288, "post_offset": 20480, "code_offset": 40960,
        "code_pages": 16, "vcpus": 1, "journal_size": wire.JOURNAL_SIZE,
    }  # fmt: skip
    at = 0
    for part in wire.CONTROL.subcons:
        if part.name in fields:
            region[at : at + part.sizeof()] = fields[part.name].to_bytes(part.sizeof(), "little")
        at += part.sizeof()

    def answer(status: wire.Status, argument: int, kind: int = wire.MessageType.HELLO) -> bytes:
        return b"\2" + wire.REPLY.build(wire.Reply(wire.MESSAGE_MAGIC, kind, status, wire.VERSION, argument))

    def journal(file: int, status: wire.Status, argument: int) -> bytes:
        attached = answer(wire.Status.OK, size)[1:]
        asked = answer(status, argument, wire.MessageType.JOURNAL)[1:]
        return b"\x0e" + attached + bytes([file]) + asked + bytes(region[:4096])

    whole = {"attached": answer(wire.Status.OK, size) + bytes(region), "refused": answer(wire.Status.BUSY, 7)}
    whole["journal"] = journal(0x0D, wire.Status.OK, wire.JOURNAL_SIZE)
    whole["journal-unsealed"] = journal(0x09, wire.Status.OK, wire.JOURNAL_SIZE)
    whole["journal-short"] = journal(0x05, wire.Status.OK, wire.JOURNAL_SIZE)
    whole["journal-refused"] = journal(0, wire.Status.REFUSED, errno.ENOMEM)
    return whole | {"trap": b"\6" + answer(wire.Status.OK, size)[1:] + _region_with_a_trap()}


def _region_with_a_trap() -> bytes:
    """Return the beginning of a region in which everything is as near to its beginning as it can be."""
    vcpu = wire.CONTROL.sizeof()
    request = vcpu + wire.VCPU.sizeof()
    doorbell = request + wire.SLOTS * 8
    posts = doorbell + wire.DOORBELLS
    code = posts + wire.POST_RING_SIZE
    region = bytearray(posts + wire.POST_RING_SIZE)
    header = struct.pack(
        "<QII6Q6IQ",
        wire.MAGIC,
        wire.VERSION,
        1,
        1 << 16,
        vcpu,
        request,
        doorbell,
        code,
        64,
        1,
        *[0] * 5,
        posts,
    )
    region[: len(header)] = header
    region[request] = 1
    region[doorbell + 1] = 1
    region[posts] = 1
    region[posts + wire.offset_of(wire.POST_RING, "entries")] = wire.TrapKind.VMCALL
    slot = vcpu + wire.offset_of(wire.VCPU, "slots")
    region[slot] = wire.TrapKind.RDMSR
    return bytes(region)


def journals() -> dict[str, bytes]:
    """Return journals with both halves in use, with a torn mark, full, and as they are in memory."""
    small = [entry(b"a", b"1" * 40), entry(b"b", b""), entry(b"gone", b"2")]
    log = [
        record(5, *small),
        record(6, entry(b"a", b"3"), entry(b"gone", None)),
        record(7, entry(b"c", b"4")),
    ]
    room = half_size(MIN_SIZE) - MARK_SIZE - 2 * RECORD_SIZE - 3 * ENTRY_SIZE
    full = [record(1, entry(b"a", b"1"), entry(b"b", bytes(room - 28))), record(2, entry(b"a", b"2" * 18))]
    two = memory_with([record(1), record(2, small[0])], log)
    torn = memory_with([*log[:2], log[2][:7] + b"\0" + log[2][8:]])
    return {
        "two-halves": input_of(two),
        "torn": input_of(torn),
        "full": input_of(memory_with(full)),
        "as-it-is": input_of(two, as_it_is=True),
        "no-half": input_of(memory_with(), as_it_is=True),
        "last-number": input_of(memory_with([record((1 << 64) - 2), record((1 << 64) - 1, *small)])),
    }


def mirrors() -> dict[str, bytes]:
    """Return a channel that compiled code has, with a packet and an answer, and one that is Python's."""
    packet = guest_packet(b"again", transaction_id=22, flags=1)
    answer = guest_packet(b"answer", kind=COMPLETION, transaction_id=21)
    slots = (
        ((0, SlotState.TAKEN, 3, 1, 2, 0, len(packet), 0), packet),
        ((1, SlotState.DONE, 3, 1, 1, 1, 0, len(answer)), answer),
    )
    given = (1, 1, 2 << 32 | 80, 160, 4)
    return {
        "given": mirror_input((7, 3, 1, 4, 1, 9), given, *slots),
        "given-since": mirror_input((7, 3, 1, 3, 0, 2), given, *slots),
        "recalled": mirror_input((7, 3, 1, 4, 0, 9), given, slots[0]),
        "adopted": mirror_input((7, 3, 1, 4, 0, 2), given, ((5, SlotState.PYTHON, *slots[0][0][2:]), packet)),
        "as-it-is": mirror_input((6, 3, 1, 4, 0, 9), given, *slots, right=False),
    }


def main() -> None:
    ids = {"machine": uuid.UUID(int=1), "migration": uuid.UUID(int=2)}
    frames = {
        name: build_frame(**ids, ran=True, writer="seed", state=state) for name, state in states().items()
    }
    for target, inputs in {
        "frames": frames,
        "saved_states": states(),
        "nbd_negotiation": negotiations(),
        "nbd_replies": replies(),
        "storvsp": requests(),
        "channel_messages": messages(),
        "gateway_socket": gateways(),
        "journal": journals(),
        "mirror": mirrors(),
        **compiled.seeds(),
    }.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
