"""The negotiation of a front end: one queue of a device of virtio, which the server works on from then on.

    GET/SET_FEATURES ─→ SET_MEMORY (descriptors of files) ─→ queue: size, addresses, eventfds ─→ ENABLE_QUEUE

The server acknowledges each message. It is a process that has read an image: its replies are checked, and it gets a
bounded time for each. After the negotiation neither side sends anything; the end of the connection is the end of the
queue.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vmbus.errors import DeviceError
from vmbus.ports import QueueLayout

from vmbus_devices.vhost_user.wire import (
    HEADER,
    MAX_REGIONS,
    MEMORY_HEAD,
    MEMORY_REGION,
    NUMBER,
    QUEUE_ADDRESSES,
    QUEUE_VALUE,
    VERSION,
    VERSION_MASK,
    Feature,
    Flag,
    Header,
    MemoryHead,
    MemoryRegion,
    Message,
    Number,
    ProtocolFeature,
    QueueAddresses,
    QueueValue,
)

_NEEDED = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.INDIRECT
_WANTED = _NEEDED | Feature.FLUSH
_QUEUE = 0


class VhostUserError(DeviceError):
    """The server refuses the queue, or breaks the protocol."""


def offer_queue(stream: socket.socket, layout: QueueLayout, timeout: float) -> None:
    """Have the server at the other end of ``stream`` work on a queue; ``timeout`` seconds for each message.

    Raises :class:`VhostUserError`, and ``OSError`` where the connection ends.
    """
    stream.settimeout(timeout)
    offered = _ask(stream, Message.GET_FEATURES)
    if missing := _NEEDED & ~offered:
        raise VhostUserError(f"the server lacks features {missing:#x} of virtio")
    protocol = _ask(stream, Message.GET_PROTOCOL_FEATURES)
    if not protocol & ProtocolFeature.REPLY_ACK:
        raise VhostUserError("the server does not acknowledge messages")
    _send(stream, Message.SET_PROTOCOL_FEATURES, NUMBER.build(Number(ProtocolFeature.REPLY_ACK)))
    _tell(stream, Message.SET_OWNER)
    _tell(stream, Message.SET_FEATURES, NUMBER.build(Number(_WANTED & offered)))
    files = layout.files
    if len(files) > MAX_REGIONS:
        raise VhostUserError(f"{len(files)} files of memory are more than the protocol allows")
    regions = [MEMORY_REGION.build(MemoryRegion(each.address, each.size, each.address, 0)) for each in files]
    memory = MEMORY_HEAD.build(MemoryHead(len(regions))) + b"".join(regions)
    _tell(stream, Message.SET_MEMORY, memory, [each.fd for each in files])
    _tell(stream, Message.SET_QUEUE_SIZE, QUEUE_VALUE.build(QueueValue(_QUEUE, layout.entries)))
    _tell(stream, Message.SET_QUEUE_BASE, QUEUE_VALUE.build(QueueValue(_QUEUE, 0)))
    addresses = QueueAddresses(_QUEUE, 0, layout.descriptors, layout.used, layout.available, 0)
    _tell(stream, Message.SET_QUEUE_ADDRESSES, QUEUE_ADDRESSES.build(addresses))
    _tell(stream, Message.SET_QUEUE_CALL, NUMBER.build(Number(_QUEUE)), [layout.call_fd])
    _tell(stream, Message.SET_QUEUE_KICK, NUMBER.build(Number(_QUEUE)), [layout.kick_fd])
    _tell(stream, Message.ENABLE_QUEUE, QUEUE_VALUE.build(QueueValue(_QUEUE, 1)))


def _send(
    stream: socket.socket,
    message: Message,
    payload: bytes = b"",
    descriptors: Sequence[int] = (),
    flags: int = 0,
) -> None:
    data = HEADER.build(Header(message, VERSION | flags, len(payload))) + payload
    # The descriptors go with the first byte; what the socket has no room for follows without them.
    sent = socket.send_fds(stream, [data], list(descriptors), socket.MSG_NOSIGNAL)
    if sent < len(data):
        stream.sendall(data[sent:], socket.MSG_NOSIGNAL)


def _tell(
    stream: socket.socket, message: Message, payload: bytes = b"", descriptors: Sequence[int] = ()
) -> None:
    """Send a message, and wait until the server has done it."""
    _send(stream, message, payload, descriptors, Flag.NEED_REPLY)
    if failure := _reply(stream, message):
        raise VhostUserError(f"the server refuses {message.name}, with {failure:#x}")


def _ask(stream: socket.socket, message: Message) -> int:
    _send(stream, message)
    return _reply(stream, message)


def _reply(stream: socket.socket, message: Message) -> int:
    found = HEADER.parse(_receive(stream, HEADER.size, message))
    expected = Header(message, found.flags, NUMBER.size)
    if found != expected or found.flags & VERSION_MASK != VERSION or not found.flags & Flag.REPLY:
        raise VhostUserError(
            f"the server breaks the protocol: it answers {message.name} with message {found.message}, "
            f"flags {found.flags:#x}, and {found.size} bytes"
        )
    return NUMBER.parse(_receive(stream, NUMBER.size, message)).value


def _receive(stream: socket.socket, length: int, message: Message) -> bytes:
    data = b""
    while len(data) < length:
        try:
            part = stream.recv(length - len(data))
        except TimeoutError as error:
            raise VhostUserError(f"the server does not answer {message.name}") from error
        if not part:
            raise ConnectionResetError(f"the server closed the connection at {message.name}")
        data += part
    return data
