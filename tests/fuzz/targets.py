"""Targets of guided fuzzing: functions that take any bytes, and return or raise AssertionError.

    frames            the carrier's frame, as a file, a socket or a snapshot delivers it
    saved_states      the stream of a machine's state, with correct checksums, checked and then loaded by a host
    nbd_negotiation   what an NBD server sends before the first request
    nbd_replies       what it sends after requests
    storvsp           packets in the ring of a storage controller: StorVSP, SCSI commands, ranges
    channel_messages  messages that a guest posts
    gateway_socket    the gateway's answer, and the memory that QEMU shares
    journal           the memory that a killed emulator leaves to the next one
    mirror            what compiled code has left beside it

An exception that the declared ones do not cover is a finding. :mod:`tests.fuzz.guided` runs them;
``tests/fuzz/corpus`` has their seeds, and every input that was once a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import socket
import struct
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vmbus.bus.server import Bus
from vmbus.errors import GatewayError, MalformedError
from vmbus.machine.gateway.client import Gateway
from vmbus.saving import StateRefused
from vmbus.saving.loading import read_machine
from vmbus.testing.fakes import FakeSynic, FakeTimers
from vmbus.testing.loopback import LoopbackGuest, gpa_direct_extension, guest_packet
from vmbus.testing.scripted import ForgetfulEndpoint, ScriptedGuest, an_offer
from vmbus.wire import gateway as gateway_wire
from vmbus.wire.chunk import HEADER_SIZE, ChunkFlags, ChunkKind, build_chunk
from vmbus.wire.frame import DIGEST_SIZE, build_frame, parse_frame
from vmbus.wire.saved import SAVED_END, SavedEnd
from vmbus_devices.nbd.connection import Connection, Request
from vmbus_devices.nbd.handshake import Export, NbdError, negotiate
from vmbus_devices.nbd.wire import Command, ExportFlag
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.backend import MemoryBackend
from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.disk import Disk

from tests.fuzz.flat import FlatMemory
from tests.fuzz.journal import JournalMemory
from tests.fuzz.mirror import MirrorMemory

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
STATES = HERE.parent / "unit" / "machine" / "stored_states"
Target = Callable[[bytes], None]


def frames(data: bytes) -> None:
    """Parse ``data`` as it is, with the right digest, and as the state in a right frame."""
    for each in (data, data + hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()):
        with contextlib.suppress(MalformedError):
            parse_frame(each)
    ran = bool(data[:1])
    frame = parse_frame(
        build_frame(machine=uuid.UUID(int=1), migration=uuid.UUID(int=2), ran=ran, writer="x", state=data)
    )
    assert (frame.state, frame.ran) == (data, ran)


def chunked(data: bytes) -> bytes:
    """Return ``data``, chunks with any lengths, numbers and checksums, with those that fit."""
    out = bytearray()
    index, at = 0, 0
    while len(data) - at >= HEADER_SIZE and index < 64:
        kind, version = int.from_bytes(data[at + 6 : at + 8], "little"), data[at + 5]
        length = int.from_bytes(data[at + 24 : at + 28], "little")
        flags = data[at + 20] & ChunkFlags.IGNORABLE
        record = data[at + HEADER_SIZE : at + HEADER_SIZE + length]
        at += HEADER_SIZE + length
        if len(data) - at < HEADER_SIZE:
            flags |= ChunkFlags.LAST
            if kind == ChunkKind.END:
                record = SAVED_END.build(SavedEnd(index, len(out)))
        out += build_chunk(kind, record, save_id=1, index=index, flags=flags, version=version)
        index += 1
    return bytes(out)


class Nobody:
    """What a host talks to that waits for a guest: all calls do nothing, and nothing is recorded."""

    code_pages = None
    clock = SimpleNamespace(tsc_frequency=None, guest_tsc_now=lambda: None)
    pending = SimpleNamespace(addresses=tuple, failed=lambda: False)
    posts = SimpleNamespace(take=tuple, withdraw=tuple)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._nothing

    def _nothing(self, *_: object, **__: object) -> tuple[()]:
        return ()

    async def execute(self, *_: object, **__: object) -> dict[str, object]:
        """Answer a command of QMP or qtest."""
        return {}

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Stand for :meth:`vmbus.machine.qemu.qtest.Qtest.loading`."""
        return contextlib.nullcontext()


class SavedStates:
    """A host that takes states. One that passes all checks is loaded, runs for a moment, and is forgotten again."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="vmbus-fuzz-", dir=shared) as folder:
            self.host = self.loop.run_until_complete(self._host(Path(folder)))
            self.ram = os.open(
                Path(folder, "memory"), os.O_RDWR | os.O_CLOEXEC
            )  # libFuzzer ends without a farewell
        self.state = self.host.migration.state
        self.loaded = 0
        """How many states passed all checks."""

    async def _host(self, folder: Path) -> Any:
        from tests.unit.machine.test_stored_states import host_for

        return host_for(folder, "first", Nobody)

    def close(self) -> None:
        """Release what the host has."""
        self.host.workers.close()
        self.host.memory.close()
        self.loop.close()
        os.close(self.ram)

    def __call__(self, data: bytes) -> None:
        with contextlib.suppress(StateRefused):
            read_machine(data)
        try:
            whole = chunked(data)
            self.state.check(whole)
        except StateRefused:
            return
        self.loop.run_until_complete(self._load(whole))

    async def _load(self, state: bytes) -> None:
        self.loaded += 1
        with contextlib.suppress(StateRefused):
            self.host.migration.load(state)
            self.state.resume()
        for _ in range(3):
            await asyncio.sleep(0)
        self.state.pause()
        self.state.reset()
        self.host.migration.expect()
        size = os.fstat(self.ram).st_size
        os.truncate(self.ram, 0)  # zeros again, in the mapping too
        os.truncate(self.ram, size)


class Stream:
    """A socket whose peer has sent ``data`` and closed."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sent = 0

    def recvmsg_into(self, views: list[memoryview], *_: int) -> tuple[int, list[Any], int, None]:
        done = 0
        for view in views:
            part = self.data[: len(view)]
            view[: len(part)] = part
            self.data = self.data[len(part) :]
            done += len(part)
        return done, [], 0, None

    def sendall(self, data: bytes) -> None:
        self.sent += len(data)
        assert self.sent < 1 << 16, "the client answers without end"

    def sendmsg(self, parts: list[bytes], *_: Any) -> int:
        return sum(len(part) for part in parts)

    def settimeout(self, _: float | None) -> None: ...
    def setsockopt(self, *_: int) -> None: ...
    def shutdown(self, _: int) -> None: ...
    def close(self) -> None: ...
    def fileno(self) -> int:
        return -1


def nbd_negotiation(data: bytes) -> None:
    stream: Any = Stream(data)
    with contextlib.suppress(NbdError, OSError):
        found = negotiate(stream, "disk")
        assert 0 <= found.size < 1 << 64


def nbd_replies(data: bytes) -> None:
    stream: Any = Stream(data)
    kind = data[0] if data else 0
    stream.data = data[1:]
    allocation = 7 if kind & 2 else None
    export = Export(1 << 20, ExportFlag(0x1ED), structured=bool(kind & 1), allocation=allocation)
    connection = Connection(stream, export)
    ended: list[int] = []
    buffer = bytearray(8192)
    around = bytes(4096)

    def request(number: int, command: Command, **more: Any) -> Request:
        return Request(command, 4096 * number, 4096, lambda _: ended.append(number), **more)

    views = [memoryview(buffer)[:1024], memoryview(buffer)[1024:4096]]
    for each in (
        request(0, Command.READ, views=views),
        request(1, Command.BLOCK_STATUS),
        request(2, Command.WRITE, views=[memoryview(bytes(4096))]),
        request(3, Command.FLUSH),
    ):
        assert connection.send(each)
    error = connection.serve()
    assert isinstance(error, OSError | NbdError), error
    assert len(ended) == len(set(ended)), "a request ended twice"
    assert buffer[4096:] == around, "more was stored than was asked for"
    connection.close()


class Take:
    """Takes numbers out of an input; zeros after its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def bytes(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        self.at += count
        return found.ljust(count, b"\0")

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    @property
    def more(self) -> bool:
        return self.at < len(self.data)


class KeptBackend(MemoryBackend):
    """A disk in memory that can be made as at first; that costs something only after a change."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.changed = False

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        self.changed = True
        super().write(offset, views, fua=fua)

    def close(self) -> None:
        """Stay open."""

    def clear(self) -> None:
        """Be zeros."""
        if self.changed:
            self.changed = False
            self.data[:] = bytes(self.size)


class StorVsp:
    """A controller with a disk and a CD-ROM, whose channel every input opens and closes.

    The units are new for each input; the controller, its memory and its rings are those of the input before.
    """

    MAX_PACKETS = 8
    NEGOTIATION = (b"\7", b"\x09".ljust(12, b"\0") + struct.pack("<HH", 0x602, 0), b"\x0a", b"\x08")

    def __init__(self) -> None:
        self.backends = KeptBackend(1 << 18), KeptBackend(1 << 16)
        self.device = Scsi()
        self.memory = FlatMemory(1 << 17)
        self.guest = LoopbackGuest(self.device, ring_pages=3, memory=self.memory, scattered=False)
        self.environment = self.device.environment
        self.guest.open()
        for message in self.NEGOTIATION:
            self._send(message.ljust(64, b"\0"), 1)
        self.negotiated = dataclasses.replace(self.device.handshake)
        assert self.negotiated.ready
        self.guest.close()

    def _send(self, payload: bytes, transaction: int) -> None:
        self.guest.send(payload, transaction_id=transaction, completion_requested=True)
        self.guest.receive()

    def _start(self) -> None:
        self.memory.clear()
        disk, disc = self.backends
        for backend in self.backends:
            backend.clear()
        self.device.units.clear()
        self.device.attach(Disk(disk, "disk"), 0, 0)
        self.device.attach(CdRom(disc, "disc"), 0, 1)
        self.guest.open()

    def __call__(self, data: bytes) -> None:
        """Open the channel, negotiated or not, and send the packets of ``data``: flags, ranges, payload."""
        take = Take(data)
        guest = self.guest
        self._start()
        if not take.number(1) & 1:
            self.device.handshake = dataclasses.replace(self.negotiated)
        number = 1
        while take.more and number <= self.MAX_PACKETS and not guest.io.failure:
            number += 1
            flags = take.number(1)
            ranges = [
                (
                    take.number(2) << (take.number(1) & 15),
                    take.number(2),
                    [take.number(2) for _ in range(take.number(1) & 15)],
                )
                for _ in range(flags & 3)
            ]
            payload = take.bytes(take.number(1))
            kind = (9, 6, 6, 7)[flags >> 2 & 3] if flags & 32 else 9 if ranges else 6
            extension = gpa_direct_extension(ranges) if ranges else b""
            guest.put(
                guest_packet(
                    payload,
                    kind=kind,
                    transaction_id=number,
                    completion_requested=not flags & 16,
                    extension=extension,
                )
            )
            guest.advance(0.01)
            if not guest.io.failure:
                guest.receive()
        assert not guest.io.failure.startswith("device"), guest.io.failure
        guest.close()
        assert not guest.channel.closing, "a command never ends"


class ChannelMessages:
    """A bus with two devices, which every input leaves as it found it: a reset of the machine forgets the guest."""

    MAX_EVENTS = 24

    def __init__(self) -> None:
        memory, synic, timers = FlatMemory(1 << 18), FakeSynic(2), FakeTimers()
        self.guest = ScriptedGuest(Bus(memory=memory, synic=synic, timers=timers), synic, memory, timers)
        self.memory = memory
        self.endpoints = [ForgetfulEndpoint() for _ in range(2)]
        for index, endpoint in enumerate(self.endpoints):
            self.guest.bus.offer(an_offer(f"device-{index}", instance=index + 1), endpoint)
        self.fresh = self.guest.bus.save()

    def __call__(self, data: bytes) -> None:
        """Post the messages of ``data``: a length, and the bytes of one; a length over 240 is another event."""
        take = Take(data)
        guest = self.guest
        self.memory.clear()
        if take.number(1) & 1:
            guest.connect()
        count = 0
        while take.more and count < self.MAX_EVENTS:
            count += 1
            length = take.number(1)
            if length > 240:
                (guest.bus.pause, guest.bus.resume, guest.take, guest.bus.reset)[length & 3]()
                continue
            guest.post(take.bytes(length), connection_id=4 if length & 1 and length < 8 else 1)
            if count % 8 == 0:
                guest.take()
        guest.take()
        guest.bus.resume()
        guest.bus.reset()
        assert guest.bus.save() == self.fresh, "a reset leaves something of the guest"
        assert not guest.bus.budget.status()["held"], "a reset leaves something of the guest's memory"
        for endpoint in self.endpoints:
            assert not endpoint.is_open and not endpoint.gpadls, endpoint.calls
            endpoint.calls.clear()
        guest.answers.clear()


JOURNAL = gateway_wire.JOURNAL_SIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _journal(size: int, seals: int) -> int:
    memory = os.memfd_create("journal", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    return memory


class GatewaySocket:
    """A gateway that sends the bytes of an input as its answer, and the rest of them as shared memory.

    Bit 3 of the first byte: behind the answer are a byte and the answer to JOURNAL. The byte: bits 0 and 1, how many
    descriptors come along; bit 2, their file is sealed; bit 3, it has the right size; bit 4, it is an eventfd.
    """

    PADDED = 1 << 16
    """Bytes of shared memory of an input that says only how it begins."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("fuzz")
        self.events = os.eventfd(0), os.eventfd(0)
        self.journals = [_journal(size, seals) for size in (4096, JOURNAL) for seals in (0, _SEALS)]
        self.peer: socket.socket | None = None
        """The other end of an attachment that asks for its journal."""

    def close(self) -> None:
        """Close what is sent."""
        for each in (self.memory, *self.events, *self.journals):
            os.close(each)
        self._hang_up()

    def _hang_up(self) -> None:
        if self.peer is not None:
            self.peer.close()
            self.peer = None

    def attach(self, data: bytes) -> Gateway:
        """Attach to the gateway that ``data`` describes. Raises what :meth:`Gateway.attach` raises."""
        take = Take(data)
        flags = take.number(1)
        reply = take.bytes(gateway_wire.REPLY.size)
        kind, journal = (take.number(1), take.bytes(gateway_wire.REPLY.size)) if flags & 8 else (0, b"")
        region = data[take.at :]
        os.ftruncate(self.memory, 0)
        os.ftruncate(self.memory, self.PADDED if flags & 4 else max(4096, len(region)))
        os.pwrite(self.memory, region[: self.PADDED], 0)
        self._hang_up()
        ours, self.peer = socket.socketpair()
        socket.send_fds(self.peer, [reply], [self.memory, *self.events][: flags & 3 or 2])
        if len(journal) == gateway_wire.REPLY.size:
            file = self.events[0] if kind & 16 else self.journals[kind >> 2 & 3]
            socket.send_fds(self.peer, [journal], [file] * (kind & 3))
        else:
            self.peer.shutdown(socket.SHUT_WR)
        return Gateway.attach_over(ours, "the gateway")

    def __call__(self, data: bytes) -> None:
        try:
            gateway = self.attach(data)
        except (GatewayError, MalformedError):
            return
        try:
            for trap in gateway.traps():
                gateway.answer(trap, 1)
            assert all(len(post.payload) <= gateway_wire.POST_PAYLOAD for post in gateway.posts.take())
            gateway.posts.promise(1)
            list(gateway.doorbells())
            gateway.clock.fields()
            gateway.counters()
            gateway.unclaimed()
            gateway.code_pages.test_and_clear(0, 64)
            gateway.forget_requests()
            assert 0 <= gateway.resets < 1 << 32
            with gateway.journal_memory() as memory:
                memory[-1] ^= 1
                assert os.pread(self.journals[3], 1, JOURNAL - 1)[0] == memory[-1], "QEMU could truncate it"
        except (GatewayError, MalformedError):
            pass
        finally:
            gateway.close()


TARGETS: dict[str, Callable[[], Target]] = {
    "frames": lambda: frames,
    "saved_states": SavedStates,
    "nbd_negotiation": lambda: nbd_negotiation,
    "nbd_replies": lambda: nbd_replies,
    "storvsp": StorVsp,
    "channel_messages": ChannelMessages,
    "gateway_socket": GatewaySocket,
    "journal": JournalMemory,
    "mirror": MirrorMemory,
}
