"""Targets of guided fuzzing: functions that take any bytes, and return or raise AssertionError.

    frames            the carrier's frame, as a file, a socket or a snapshot delivers it
    saved_states      the stream of a machine's state, with correct checksums, checked and then loaded by a host
    nbd_negotiation   what an NBD server sends before the first request
    nbd_replies       what it sends after requests
    storvsp           packets in the ring of a storage controller: StorVSP, SCSI commands, ranges
    channel_messages  messages that a guest posts
    gateway_socket    the gateway's answer, and the memory that QEMU shares

An exception that the declared ones do not cover is a finding. :mod:`tests.fuzz.guided` runs them;
``tests/fuzz/corpus`` has their seeds, and every input that was once a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import struct
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmbus.errors import GatewayError, MalformedError
from vmbus.machine.gateway.client import Gateway
from vmbus.saving import StateRefused
from vmbus.saving.loading import read_machine
from vmbus.testing.fakes import FakeMemory
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


class SavedStates:
    """Hosts that take states. One host checks all of them; a state that passes is loaded by one of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="vmbus-fuzz-"))
        self.number = 0
        self.host = self.loop.run_until_complete(self._host())
        self.state = self.host.migration.state

    async def _host(self) -> Any:
        from tests.unit.machine.test_stored_states import host_for

        self.number += 1
        folder = self.folder / str(self.number % 4)
        folder.mkdir(exist_ok=True)
        return host_for(folder, "first")

    def close(self) -> None:
        """Release what the first host has."""
        self.host.workers.close()
        self.host.memory.close()
        self.loop.close()
        shutil.rmtree(self.folder)

    def __call__(self, data: bytes) -> None:
        whole = chunked(data)
        with contextlib.suppress(StateRefused):
            read_machine(data)
        try:
            read_machine(whole)
            self.state.check(whole)
        except StateRefused:
            return
        self.loop.run_until_complete(self._load(whole))

    async def _load(self, state: bytes) -> None:
        host = await self._host()
        try:
            with contextlib.suppress(StateRefused):
                host.migration.load(state)
            for _ in range(3):
                await asyncio.sleep(0)
            host.bus.reset()
        finally:
            host.workers.close()
            host.memory.close()


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


def storvsp(data: bytes) -> None:
    """Open a controller's channel and send the packets of ``data``: flags, ranges, payload."""
    take = Take(data)
    device = Scsi()
    device.attach(Disk(MemoryBackend(1 << 20), "disk"), 0, 0)
    device.attach(CdRom(MemoryBackend(1 << 16), "disc"), 0, 1)
    memory = FakeMemory(1 << 20)
    guest = LoopbackGuest(device, ring_pages=8, memory=memory)
    guest.open()
    if not take.number(1) & 1:
        for operation, union in ((7, b""), (9, struct.pack("<HH", 0x602, 0)), (10, b""), (8, b"")):
            send(guest, struct.pack("<III", operation, 1, 0) + union, 1)
    number = 1
    while take.more and number < 24 and not guest.io.failure:
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


def channel_messages(data: bytes) -> None:
    """Post the messages of ``data``: a length, and the bytes of one; a length over 240 is another event."""
    take = Take(data)
    guest = ScriptedGuest.on_fakes(vp_count=2, memory_size=1 << 18)
    endpoints = [ForgetfulEndpoint() for _ in range(2)]
    for index, endpoint in enumerate(endpoints):
        guest.bus.offer(an_offer(f"device-{index}", instance=index + 1), endpoint)
    if take.number(1) & 1:
        guest.connect()
        guest.take()
    count = 0
    while take.more and count < 64:
        count += 1
        length = take.number(1)
        if length > 240:
            (guest.bus.pause, guest.bus.resume, guest.take, guest.bus.reset)[length & 3]()
            continue
        guest.post(take.bytes(length), connection_id=4 if length & 1 and length < 8 else 1)
        if count % 8 == 0:
            guest.take()
    guest.bus.reset()


class GatewaySocket:
    """A gateway that sends the bytes of an input as its answer, and the rest of them as shared memory."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="vmbus-fuzz-")
        self.path = f"{self.folder}/gateway.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.data = b""
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End the server."""
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        shutil.rmtree(self.folder)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(gateway_wire.MESSAGE.size)
                take = Take(self.data)
                count = take.number(1) & 3
                reply = take.bytes(gateway_wire.REPLY.size)
                memory = os.memfd_create("fuzz")
                os.write(memory, take.bytes(max(4096, len(self.data))))
                descriptors = [memory, os.eventfd(0), os.eventfd(0)][: count or 2]
                socket.send_fds(connection, [reply], descriptors)
                for each in {memory, *descriptors}:
                    os.close(each)

    def __call__(self, data: bytes) -> None:
        self.data = data
        try:
            gateway = Gateway.attach(self.path)
        except (GatewayError, MalformedError):
            return
        try:
            gateway.traps()
            list(gateway.doorbells())
            gateway.clock.fields()
            gateway.counters()
            gateway.code_pages.test_and_clear(0, 64)
        except (GatewayError, MalformedError):
            pass
        finally:
            gateway.close()


def send(guest: LoopbackGuest, payload: bytes, transaction: int) -> None:
    guest.send(payload.ljust(64, b"\0"), transaction_id=transaction, completion_requested=True)
    guest.receive()


TARGETS: dict[str, Callable[[], Target]] = {
    "frames": lambda: frames,
    "saved_states": SavedStates,
    "nbd_negotiation": lambda: nbd_negotiation,
    "nbd_replies": lambda: nbd_replies,
    "storvsp": lambda: storvsp,
    "channel_messages": lambda: channel_messages,
    "gateway_socket": GatewaySocket,
}
