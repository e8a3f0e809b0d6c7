"""The other end of the negotiation: a server of plain ``struct`` formats, which tests have do what it should not."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable

from vmbus.ports import QueueLayout, SharedFile
from vmbus_devices.vhost_user.wire import Feature, Message, ProtocolFeature

FEATURES = int(Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.INDIRECT | Feature.FLUSH) | 1 << 24
REPLY, NEED_REPLY = 4, 8
PROTOCOL = int(ProtocolFeature.REPLY_ACK) | 1

Answer = Callable[[int, int], bytes | None]


def reply(message: int, value: int, *, flags: int = 1 | REPLY, size: int = 8) -> bytes:
    return struct.pack("<IIIQ", message, flags, size, value)


class Server(threading.Thread):
    """``answer(message, flags)`` returns its reply; ``None``: the ordinary one; empty: none, and the end."""

    def __init__(self, stream: socket.socket, answer: Answer) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.answer = answer
        self.heard: list[tuple[int, int, bytes, int]] = []
        """Message, flags, payload, and the number of descriptors that came with it."""
        self.start()

    def run(self) -> None:
        with self.stream, contextlib.suppress(OSError):  # the front end has ended
            while True:
                data, ancillary, _, _ = self.stream.recvmsg(12, socket.CMSG_SPACE(8 * 4))
                if len(data) < 12:
                    return
                message, flags, size = struct.unpack("<III", data)
                payload = self.stream.recv(size, socket.MSG_WAITALL) if size else b""
                descriptors = array.array("i")
                for _, _, found in ancillary:
                    descriptors.frombytes(found)
                self.received(message, payload, list(descriptors))
                self.heard.append((message, flags, payload, len(descriptors)))
                answer = self.answer(message, flags)
                if answer is None:
                    answer = self.ordinary(message, flags)
                elif not answer:
                    return
                self.stream.sendall(answer)

    def received(self, message: int, payload: bytes, descriptors: list[int]) -> None:
        """Called with each message, before it is answered; the descriptors are to be closed."""
        for each in descriptors:
            os.close(each)

    def ordinary(self, message: int, flags: int) -> bytes:
        values = {Message.GET_FEATURES: FEATURES, Message.GET_PROTOCOL_FEATURES: PROTOCOL}
        if message in values:
            return reply(message, values[Message(message)])
        return reply(message, 0) if flags & NEED_REPLY else b""


class QueueOwner(Server):
    """A server that knows the queue when it is enabled, and keeps the descriptors until :meth:`close`."""

    def __init__(self, stream: socket.socket) -> None:
        self.descriptors: dict[int, list[int]] = {}
        self.layout: QueueLayout | None = None
        super().__init__(stream, lambda message, flags: None)

    def received(self, message: int, payload: bytes, descriptors: list[int]) -> None:
        self.descriptors.setdefault(message, []).extend(descriptors)
        if message == Message.ENABLE_QUEUE:
            self.layout = self._layout({each: data for each, _, data, _ in self.heard})

    def _layout(self, payloads: dict[int, bytes]) -> QueueLayout:
        regions = struct.iter_unpack("<4Q", payloads[Message.SET_MEMORY][8:])
        files = zip(self.descriptors[Message.SET_MEMORY], regions, strict=True)
        _, entries = struct.unpack("<II", payloads[Message.SET_QUEUE_SIZE])
        descriptors, used, available = struct.unpack_from("<3Q", payloads[Message.SET_QUEUE_ADDRESSES], 8)
        return QueueLayout(
            tuple(SharedFile(fd, size, address) for fd, (address, size, _, _) in files),
            entries,
            descriptors,
            available,
            used,
            self.descriptors[Message.SET_QUEUE_KICK][0],
            self.descriptors[Message.SET_QUEUE_CALL][0],
        )

    def close(self) -> None:
        self.join()
        for each in self.descriptors.values():
            for fd in each:
                os.close(fd)
        self.descriptors.clear()
