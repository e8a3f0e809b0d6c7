"""One connection to an NBD server: many requests under way, no copy between socket and guest pages.

    send()    any thread           header and views → socket; a sender thread sends the rest if the socket is full
    watch()   event loop's thread  on readable: reply → its request's views → request.done()
    serve()   one thread           the same, where there is no event loop

An error of the server's (an unknown cookie, a chunk outside of its request) ends the connection: the position of the
next reply in the stream is unknown after that.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vmbus.ports import Workers

from vmbus_devices.nbd.handshake import MAX_VIEWS, Export, NbdError, behind, receive_into
from vmbus_devices.nbd.wire import (
    ALLOCATION_HOLE,
    CHUNK_DONE,
    CHUNK_ERROR,
    CHUNK_ERROR_DATA,
    CHUNK_MAGIC,
    CHUNK_STRUCT,
    EXTENT,
    HOLE,
    MAX_STRING,
    REQUEST_MAGIC,
    REQUEST_STRUCT,
    SIMPLE_REPLY_MAGIC,
    SIMPLE_REPLY_STRUCT,
    ChunkType,
    Command,
    CommandFlag,
    ExportFlag,
)

_logger = logging.getLogger(__name__)

_MAX_AT_ONCE = 256
"""Parts of replies that are received before the event loop serves its other callers."""

_KNOWN_ERRORS = {
    errno.EPERM,
    errno.EIO,
    errno.ENOMEM,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EOVERFLOW,
    errno.EOPNOTSUPP,
    errno.ESHUTDOWN,
}
"""The protocol's error numbers; they are Linux's."""

_MAX_EXTENTS = 64
_MAX_STATUS = 4 + (1 << 20)
"""Bytes of a chunk BLOCK_STATUS."""
_LENGTH = struct.Struct(">I")
_OFFSET = struct.Struct(">Q")


@dataclass(slots=True, eq=False)
class Request:
    """A command on its way. ``done`` is called once, in any thread, with the error if there was one."""

    command: Command
    offset: int
    length: int
    done: Callable[[OSError | None], None]
    views: list[memoryview] = field(default_factory=list)
    flags: int = 0
    whole: bool = False
    """A read whose data may not come in parts; one that is sent again is such a read in any case.

    Where QEMU's server cannot read a part it ends the connection, and says nothing of an error (nbd/server.c).
    """
    sent: float = 0.0
    """Time of ``time.monotonic`` at which it was sent last."""
    deadline: float | None = None
    """Time of ``time.monotonic`` at which the request fails if there is no connection."""
    extents: list[tuple[int, int, bool]] = field(default_factory=list)
    received: int = 0
    error: OSError | None = None

    def begin(self) -> None:
        """Clear the results of an earlier attempt."""
        self.sent = time.monotonic()
        self.extents.clear()
        self.received = 0
        self.error = None


class Connection:
    """A connection after the negotiation, over the socket ``stream``."""

    def __init__(self, stream: socket.socket, export: Export) -> None:
        self.export = export
        self.requests: dict[int, Request] = {}
        self.replies = 0
        """Replies, or chunks of replies, received so far."""
        self._whole = int(CommandFlag.DONT_FRAGMENT) if export.flags & ExportFlag.DONT_FRAGMENT else 0
        self._overtaken = (0, 0.0)
        """The oldest request, and since when requests behind it are answered."""
        self._stream = stream
        self._next = 1
        self._ended = False
        self._changed = threading.Condition()
        self._outgoing: deque[list[memoryview | bytes]] = deque()
        self._sender: threading.Thread | None = None
        self._head = memoryview(bytearray(SIMPLE_REPLY_STRUCT.size))
        self._parser = self._replies()
        self._wanted: list[memoryview] = []
        """Where the next bytes of the stream go."""
        self._stop_watching: Callable[[], None] | None = None
        self._error: Exception | None = None
        stream.settimeout(None)
        with contextlib.suppress(OSError):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)

    # --- requests ---

    def send(self, request: Request) -> bool:
        """Send ``request``; does not block. Return False if the connection has ended."""
        with self._changed:
            if self._ended:
                return False
            flags = request.flags
            if request.command is Command.READ and (request.whole or request.sent):
                flags |= self._whole
            request.begin()
            cookie = self._next
            self._next = cookie + 1
            self.requests[cookie] = request
            header = REQUEST_STRUCT.pack(
                REQUEST_MAGIC, flags, request.command, cookie, request.offset, request.length
            )
            self._put([header, *request.views] if request.command is Command.WRITE else [header])
        return True

    def _put(self, parts: list[memoryview | bytes]) -> None:
        if not self._outgoing:
            try:
                done = self._stream.sendmsg(parts[:MAX_VIEWS], (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                done = 0
            except OSError:
                self._shut()  # the receiver reports the reason
                return
            parts = _rest(parts, done)
            if not parts:
                return
        self._outgoing.append(parts)
        if self._sender is None:
            sender = threading.Thread(target=self._send_rest, name="nbd-sender", daemon=True)
            try:
                sender.start()
            except RuntimeError as error:
                _logger.warning("a connection ends, since the rest of a request cannot be sent: %s", error)
                self._shut()
                return
            self._sender = sender
        self._changed.notify_all()

    def _send_rest(self) -> None:
        while True:
            with self._changed:
                while not self._outgoing and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                parts = self._outgoing[0]
            while parts:
                try:
                    parts = _rest(parts, self._stream.sendmsg(parts[:MAX_VIEWS], (), socket.MSG_NOSIGNAL))
                except OSError:
                    self._shut()
                    return
            with self._changed:
                self._outgoing.popleft()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # shut down already
            self._stream.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Disconnect and have :meth:`serve` return; no request is accepted any more."""
        with self._changed:
            if not self._ended and not self._outgoing and not self.requests:
                with contextlib.suppress(OSError):  # the server has gone
                    self._stream.send(
                        REQUEST_STRUCT.pack(REQUEST_MAGIC, 0, Command.DISCONNECT, 0, 0, 0),
                        socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
                    )
            self._ended = True
            self._changed.notify_all()
        self._shut()

    def close(self) -> list[Request]:
        """Close the socket, and return the requests without an answer, oldest first.

        Called after :meth:`end`, and after :meth:`serve` returned.
        """
        if self._stop_watching is not None:
            self._stop_watching()
        if self._sender is not None:
            self._sender.join()
        self._stream.close()
        left = list(self.requests.values())
        self.requests.clear()
        return left

    # --- replies ---

    def serve(self) -> Exception:
        """Receive replies until the connection ends; return the reason."""
        try:
            for views in self._parser:
                receive_into(self._stream, views)
        except (OSError, NbdError) as error:
            return error
        finally:
            self._stop_taking()
        raise AssertionError("replies have no end")

    def watch(self, workers: Workers, broken: Callable[[Connection, Exception], None]) -> bool:
        """Receive replies in the event loop's thread, where ``broken`` is called at the end of the connection.

        Return False where there is no event loop.
        """

        def readable() -> None:
            error = self._error or self._take()
            if error is not None:
                self._error = error
                if self._stop_watching is not None:
                    self._stop_watching()
                self._stop_taking()
                broken(self, error)

        self._stop_watching = workers.watch(self._stream.fileno(), readable)
        return self._stop_watching is not None

    def _take(self) -> Exception | None:
        """Receive what has arrived, some replies at most; return the reason if the connection has ended."""
        receive = self._stream.recvmsg_into
        try:
            for _ in range(_MAX_AT_ONCE):
                wanted = self._wanted
                left = sum([len(view) for view in wanted])
                done = receive(wanted[:MAX_VIEWS], 0, socket.MSG_DONTWAIT)[0] if left else 0
                if done < left:
                    if not done:
                        raise ConnectionResetError("the server closed the connection")
                    self._wanted = behind(wanted, done)
                else:
                    self._wanted = next(self._parser)
        except BlockingIOError:
            return None
        except (OSError, NbdError) as error:
            return error
        except Exception as error:
            _logger.exception("the receiver of replies failed; please report this")
            return error
        return None

    def _stop_taking(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._shut()

    def _request(self, cookie: int) -> Request:
        request = self.requests.get(cookie)
        if request is None:
            raise NbdError(
                f"the server breaks the NBD protocol: it answers {cookie:#x}, but no such request is under way"
            )
        return request

    def _finish(self, cookie: int, error: OSError | None) -> None:
        with self._changed:
            request = self.requests.pop(cookie)
            oldest = next(iter(self.requests), cookie)
            if oldest < cookie and oldest != self._overtaken[0]:
                self._overtaken = oldest, time.monotonic()
        request.done(error)

    def overtaken(self) -> float | None:
        """Return since when (``time.monotonic``) the server answers others in place of one request, if it does.

        A request that waits behind others on a slow connection is not overtaken.
        """
        cookie, since = self._overtaken
        return since if cookie in self.requests else None

    def oldest(self) -> float | None:
        """Return when (``time.monotonic``) the oldest request was sent that has no answer; ``None`` if all have."""
        with self._changed:
            return min((each.sent for each in self.requests.values()), default=None)

    def _replies(self) -> Iterator[list[memoryview]]:
        """Parse replies: yield where the next bytes of the stream go, and continue when they have arrived."""
        head = self._head
        while True:
            yield [head]
            self.replies += 1
            magic, error, cookie = SIMPLE_REPLY_STRUCT.unpack(head)
            if magic == CHUNK_MAGIC and self.export.structured:
                _, flags, kind, cookie = CHUNK_STRUCT.unpack(head)
                yield from self._chunk(flags, kind, cookie)
                continue
            if magic != SIMPLE_REPLY_MAGIC:
                raise NbdError(f"the server breaks the NBD protocol: a reply begins with {magic:#x}")
            request = self._request(cookie)
            if error:
                self._finish(cookie, _failure(error))
                continue
            if request.command is Command.READ:
                yield request.views
            elif request.command is Command.BLOCK_STATUS:
                raise NbdError("the server breaks the NBD protocol: a simple reply to BLOCK_STATUS")
            self._finish(cookie, None)

    def _chunk(self, flags: int, kind: int, cookie: int) -> Iterator[list[memoryview]]:
        request = self._request(cookie)
        if cookie == self._overtaken[0]:
            self._overtaken = cookie, time.monotonic()
        number = bytearray(_LENGTH.size)
        yield [memoryview(number)]
        (length,) = _LENGTH.unpack(number)
        if kind == ChunkType.OFFSET_DATA and length > _OFFSET.size:
            place = bytearray(_OFFSET.size)
            yield [memoryview(place)]
            yield self._part(request, _OFFSET.unpack(place)[0], length - _OFFSET.size)
        else:
            if length > _MAX_STATUS:
                raise NbdError(f"the server breaks the NBD protocol: a chunk {kind} of {length} bytes")
            data = bytearray(length)
            yield [memoryview(data)]
            self._small_chunk(request, kind, bytes(data))
        if flags & CHUNK_DONE:
            if request.command is Command.READ and not request.error and request.received != request.length:
                raise NbdError(
                    f"the server breaks the NBD protocol: {request.received} bytes of {request.length} were sent"
                )
            self._finish(cookie, request.error)

    def _part(self, request: Request, offset: int, length: int) -> list[memoryview]:
        """Return where ``length`` bytes at ``offset`` go, which are part of a READ."""
        start = offset - request.offset
        if request.command is not Command.READ or length <= 0 or start < 0 or start + length > request.length:
            raise NbdError(
                f"the server breaks the NBD protocol: {length} bytes at {offset} in answer "
                f"to a request for {request.length} at {request.offset}"
            )
        request.received += length
        if length == request.length:
            return request.views
        found = []
        for view in request.views:
            if length <= 0:
                break
            if start < len(view):
                found.append(view[start : start + length])
                length -= len(found[-1])
                start = 0
            else:
                start -= len(view)
        return found

    def _small_chunk(self, request: Request, kind: int, data: bytes) -> None:
        if kind == ChunkType.OFFSET_HOLE and len(data) == HOLE.size:
            hole = HOLE.parse(data)
            for view in self._part(request, hole.offset, hole.length):
                view[:] = bytes(len(view))
        elif kind & CHUNK_ERROR and len(data) >= CHUNK_ERROR_DATA.size:
            found = CHUNK_ERROR_DATA.parse(data)
            message = data[CHUNK_ERROR_DATA.size :][: min(found.message_length, MAX_STRING)]
            request.error = _failure(found.error, message.decode(errors="replace"))
        elif kind == ChunkType.BLOCK_STATUS and request.command is Command.BLOCK_STATUS:
            if (
                len(data) < 4
                or (len(data) - 4) % EXTENT.size
                or int.from_bytes(data[:4], "big") != (self.export.allocation)
            ):
                raise NbdError("the server breaks the NBD protocol: a damaged BLOCK_STATUS")
            self._extents(request, data[4:])
        elif kind != ChunkType.NONE or data:
            raise NbdError(f"the server breaks the NBD protocol: a chunk {kind:#x} of {len(data)} bytes")

    def _extents(self, request: Request, data: bytes) -> None:
        at, end = request.offset, request.offset + request.length
        for place in range(0, min(len(data), _MAX_EXTENTS * EXTENT.size), EXTENT.size):
            extent = EXTENT.parse(data[place : place + EXTENT.size])
            step = min(extent.length, end - at)
            if not step:
                break
            request.extents.append((at, step, not extent.flags & ALLOCATION_HOLE))
            at += step


def _failure(number: int, message: str = "") -> OSError:
    """Return the error for an error number of the server; its ``message`` says what failed, not why."""
    if number not in _KNOWN_ERRORS:
        number = errno.EIO
    reason = os.strerror(number)
    return OSError(number, f"{reason} ({message})" if message else reason)


def _rest(parts: list[memoryview | bytes], done: int) -> list[memoryview | bytes]:
    """Return what is left of ``parts`` after ``done`` bytes."""
    left: list[memoryview | bytes] = []
    for part in parts:
        if done >= len(part):
            done -= len(part)
        else:
            left.append(memoryview(part)[done:] if done else part)
            done = 0
    return left
