"""The negotiation between a client and an NBD server: fixed newstyle, and GO for one export.

    greeting → structured replies? → base:allocation? → GO → ready

Structured replies, block sizes and block status are optional. A server without GO (from before 2017) is refused.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from vmbus.errors import DeviceError, MalformedError

from vmbus_devices.nbd.wire import (
    BASE_ALLOCATION,
    BLOCK_SIZE_INFO,
    DEFAULT_MAXIMUM,
    EXPORT_INFO,
    GO_REQUEST,
    GREETING,
    GREETING_MAGIC,
    MAX_STRING,
    META_CONTEXT,
    META_CONTEXT_REQUEST,
    OPTION_ERROR,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    OPTION_REQUEST,
    ExportFlag,
    GoRequest,
    HandshakeFlag,
    Info,
    MetaContextRequest,
    Option,
    OptionAnswer,
    OptionReply,
    OptionRequest,
)

MAX_VIEWS = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one system call takes. A guest may scatter its data over more of them."""
_MAX_ANSWERS = 64
_MAX_DATA = 2 * MAX_STRING
_MAX_SIZE = 1 << 62


class NbdError(DeviceError):
    """The server refuses, or breaks the protocol."""


@dataclass(frozen=True, slots=True)
class Export:
    """An export of a server. Sizes in bytes."""

    size: int
    flags: ExportFlag
    minimum: int = 1
    preferred: int = 4096
    maximum: int = DEFAULT_MAXIMUM
    structured: bool = False
    allocation: int | None = None
    """Id of the context ``base:allocation``, if the server has block status."""


def receive(connection: socket.socket, length: int) -> bytes:
    """Return exactly ``length`` bytes. Raises ``OSError``, also ``ConnectionResetError`` at the end of the stream."""
    data = bytearray(length)
    receive_into(connection, [memoryview(data)])
    return bytes(data)


def receive_into(connection: socket.socket, views: list[memoryview]) -> None:
    """Fill ``views``. Raises as :func:`receive`."""
    left = sum([len(view) for view in views])
    while left:
        done = connection.recvmsg_into(views[:MAX_VIEWS], 0, socket.MSG_WAITALL)[0]
        if not done:
            raise ConnectionResetError("the server closed the connection")
        left -= done
        if left:
            views = behind(views, done)


def behind(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of ``views`` after ``done`` bytes."""
    left = []
    for view in views:
        if done >= len(view):
            done -= len(view)
        else:
            left.append(view[done:])
            done = 0
    return left


def negotiate(connection: socket.socket, name: str) -> Export:
    """Agree on the export ``name``. Raises :class:`NbdError` and ``OSError``."""
    try:
        return _Negotiation(connection, name.encode()).run()
    except MalformedError as error:
        raise NbdError(f"the server breaks the NBD protocol: {error.detail}") from error


class _Negotiation:
    def __init__(self, connection: socket.socket, name: bytes) -> None:
        self.connection = connection
        self.name = name

    def run(self) -> Export:
        greeting = GREETING.parse(receive(self.connection, GREETING.size))
        if greeting.magic != GREETING_MAGIC or greeting.option_magic != OPTION_MAGIC:
            raise NbdError("not an NBD server, or one without negotiation (oldstyle)")
        if not greeting.flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise NbdError("the NBD server is too old: it has no fixed newstyle negotiation")
        flags = HandshakeFlag.FIXED_NEWSTYLE | (greeting.flags & HandshakeFlag.NO_ZEROES)
        self.connection.sendall(int(flags).to_bytes(4, "big"))
        structured = self._structured()
        allocation = self._allocation() if structured else None
        return self._go(structured, allocation)

    def _ask(self, option: Option, data: bytes = b"") -> None:
        header = OPTION_REQUEST.build(OptionRequest(OPTION_MAGIC, option, len(data)))
        self.connection.sendall(header + data)

    def _answer(self, option: Option) -> tuple[OptionReply, bytes]:
        reply = OPTION_REPLY.parse(receive(self.connection, OPTION_REPLY.size))
        if reply.magic != OPTION_REPLY_MAGIC or reply.option != option or reply.length > _MAX_DATA:
            raise NbdError(f"the server breaks the NBD protocol: its answer to {option.name} is {reply}")
        return reply, receive(self.connection, reply.length)

    def _structured(self) -> bool:
        self._ask(Option.STRUCTURED_REPLY)
        return self._answer(Option.STRUCTURED_REPLY)[0].answer == OptionAnswer.ACK

    def _allocation(self) -> int | None:
        self._ask(
            Option.SET_META_CONTEXT,
            META_CONTEXT_REQUEST.build(MetaContextRequest(self.name, (BASE_ALLOCATION,))),
        )
        found = None
        for _ in range(_MAX_ANSWERS):
            reply, data = self._answer(Option.SET_META_CONTEXT)
            if reply.answer == OptionAnswer.META_CONTEXT:
                context = META_CONTEXT.parse(data)
                if context.name == BASE_ALLOCATION:
                    found = context.context
            elif reply.answer == OptionAnswer.ACK:
                return found
            elif reply.answer & OPTION_ERROR:
                return None
        raise NbdError("the server breaks the NBD protocol: it lists too many contexts")

    def _go(self, structured: bool, allocation: int | None) -> Export:
        self._ask(Option.GO, GO_REQUEST.build(GoRequest(self.name, (Info.BLOCK_SIZE,))))
        export = None
        minimum, preferred, maximum = 1, 4096, DEFAULT_MAXIMUM
        for _ in range(_MAX_ANSWERS):
            reply, data = self._answer(Option.GO)
            if reply.answer == OptionAnswer.ACK:
                if export is None:
                    raise NbdError(
                        "the server breaks the NBD protocol: it did not send the size of the export"
                    )
                if not 0 <= export.size <= _MAX_SIZE:
                    raise NbdError(f"the export has an impossible size: {export.size} bytes")
                flags = ExportFlag(export.flags)
                return Export(export.size, flags, minimum, preferred, maximum, structured, allocation)
            if reply.answer & OPTION_ERROR:
                raise NbdError(self._refusal(reply.answer, data))
            if reply.answer != OptionAnswer.INFO or len(data) < 2:
                continue
            kind = int.from_bytes(data[:2], "big")
            if kind == Info.EXPORT:
                export = EXPORT_INFO.parse(data)
            elif kind == Info.BLOCK_SIZE:
                sizes = BLOCK_SIZE_INFO.parse(data)
                minimum, preferred, maximum = sizes.minimum, sizes.preferred, sizes.maximum
                if not 1 <= minimum <= preferred <= maximum or minimum & (minimum - 1):
                    raise NbdError(f"the server announces impossible block sizes: {sizes}")
        raise NbdError("the server breaks the NBD protocol: it sends too many answers to GO")

    def _refusal(self, answer: int, data: bytes) -> str:
        reasons = {
            OptionAnswer.UNKNOWN: f"the server has no export {self.name.decode(errors='replace')!r}",
            OptionAnswer.UNSUPPORTED: "the NBD server is too old: it does not support the option GO",
            OptionAnswer.TLS_REQUIRED: "the server requires TLS, which is not supported",
            OptionAnswer.SHUTDOWN: "the server is shutting down",
        }
        known = {int(each) for each in reasons}
        what = reasons[OptionAnswer(answer)] if answer in known else f"the server refuses ({answer:#x})"
        said = data[:MAX_STRING].decode(errors="replace").strip()
        return f"{what}: {said}" if said else what
