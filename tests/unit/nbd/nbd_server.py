"""An NBD server in threads, from plain ``struct`` formats: with data, with faults, and with none of the protocol."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

FLUSH, FUA, TRIM, ZEROES, DF, MULTI = 4, 8, 32, 64, 128, 256
DF_FLAG = 4
"""Of a request."""
ALL = 1 | FLUSH | FUA | TRIM | ZEROES | MULTI
READ, WRITE, DISC, FLUSH_COMMAND, TRIM_COMMAND, ZEROES_COMMAND, STATUS = 0, 1, 2, 3, 4, 6, 7


def greeting(flags: int = 3) -> bytes:
    return b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", flags)


def option_reply(option: int, answer: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, answer, len(data)) + data


def export_info(size: int, flags: int) -> bytes:
    return struct.pack(">HQH", 0, size, flags)


def block_size_info(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">HIII", 3, minimum, preferred, maximum)


def simple_reply(cookie: int, error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def chunk(cookie: int, kind: int, data: bytes = b"", flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data)) + data


@dataclass
class Server:
    """A connector for a client whose every connection is served by a thread. Attributes can be changed any time."""

    data: bytearray
    flags: int = ALL
    structured: bool = True
    contexts: bool = True
    block_sizes: tuple[int, int, int] | None = None
    export: str = "disk"
    beside: tuple[int, int] = (0, 0)
    """What it does beside the connections."""
    beside_overtaken: float | None = None
    """Since when it leaves a request out there."""
    given_up: list[str] = field(default_factory=list)
    #: Called with (command, flags, offset, length) before each request; returns an errno, or bytes to send instead.
    before: Callable[[int, int, int, int, int], int | bytes | None] | None = None
    #: In place of the negotiation.
    negotiation: bytes | None = None
    refuse: bool = False
    seen: list[tuple[int, int, int, int]] = field(default_factory=list)
    options: list[int] = field(default_factory=list)
    sessions: int = 0
    ended_sessions: int = 0
    connections: list[socket.socket] = field(default_factory=list)

    # --- the connector ---

    def connect(self, number: int) -> socket.socket:
        if self.refuse:
            raise ConnectionRefusedError(111, "Connection refused")
        self.sessions += not number
        here, there = socket.socketpair()
        here.settimeout(5)
        self.serve_in_thread(there)
        return here

    def activity(self) -> tuple[int, int]:
        return self.beside

    def oldest(self) -> float | None:
        return self.beside_overtaken

    def overtaken(self) -> float | None:
        return self.beside_overtaken

    def give_up(self, why: str) -> None:
        self.given_up.append(why)

    def ended(self) -> None:
        self.ended_sessions += 1

    def hang_up(self) -> None:
        """Break every connection."""
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is broken already
        self.connections.clear()

    # --- the server ---

    def serve_in_thread(self, stream: socket.socket) -> None:
        self.connections.append(stream)
        threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        try:
            with stream:
                if self.negotiation is not None:
                    stream.sendall(self.negotiation)
                    while stream.recv(4096):
                        pass
                elif self._negotiate(stream):
                    while self._request(stream):
                        pass
        except OSError:
            return  # the client has gone

    def _exactly(self, stream: socket.socket, length: int) -> bytes:
        data = stream.recv(length, socket.MSG_WAITALL) if length else b""
        if len(data) != length:
            raise ConnectionResetError
        return data

    def _negotiate(self, stream: socket.socket) -> bool:
        stream.sendall(greeting())
        assert self._exactly(stream, 4) in (b"\0\0\0\3", b"\0\0\0\1")
        while True:
            magic, option, length = struct.unpack(">8sII", self._exactly(stream, 16))
            assert magic == b"IHAVEOPT"
            data = self._exactly(stream, length)
            self.options.append(option)
            if option == 8 and self.structured:
                stream.sendall(option_reply(8, 1))
            elif option == 10 and self.contexts:
                stream.sendall(option_reply(10, 4, struct.pack(">I", 77) + b"base:allocation"))
                stream.sendall(option_reply(10, 1))
            elif option == 7:
                (size,) = struct.unpack_from(">I", data)
                if data[4 : 4 + size].decode() != self.export:
                    stream.sendall(option_reply(7, 0x80000006, b"no such export"))
                    return False
                stream.sendall(option_reply(7, 3, export_info(len(self.data), self.flags)))
                if self.block_sizes:
                    stream.sendall(option_reply(7, 3, block_size_info(*self.block_sizes)))
                stream.sendall(option_reply(7, 1))
                return True
            else:
                stream.sendall(option_reply(option, 0x80000001))

    def _request(self, stream: socket.socket) -> bool:
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self._exactly(stream, 28))
        assert magic == 0x25609513
        sent = self._exactly(stream, length) if command == WRITE else b""
        self.seen.append((command, flags, offset, length))
        if command == DISC:
            return False
        answer = self.before(command, flags, offset, length, cookie) if self.before else None
        if isinstance(answer, bytes):
            stream.sendall(answer)
            return True
        if answer:
            stream.sendall(simple_reply(cookie, answer))
            return True
        if command == WRITE:
            self.data[offset : offset + length] = sent
        elif command in (TRIM_COMMAND, ZEROES_COMMAND):
            self.data[offset : offset + length] = bytes(length)
        stream.sendall(self._answer(command, cookie, offset, length))
        return True

    def _answer(self, command: int, cookie: int, offset: int, length: int) -> bytes:
        if command == STATUS:
            half = length // 2
            extents = struct.pack(">IIIII", 77, half, 0, length - half, 3)
            return chunk(cookie, 5, extents)
        if command != READ:
            return simple_reply(cookie)
        found = bytes(self.data[offset : offset + length])
        if not self.structured:
            return simple_reply(cookie) + found
        half = length // 2  # in two parts, the last one first, and with a hole where there is one
        parts = b""
        for start, part in ((half, found[half:]), (0, found[:half])):
            if part and not any(part):
                parts += chunk(cookie, 2, struct.pack(">QI", offset + start, len(part)), 0)
            elif part:
                parts += chunk(cookie, 1, struct.pack(">Q", offset + start) + part, 0)
        return parts + chunk(cookie, 0)
