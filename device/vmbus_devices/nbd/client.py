"""One export of an NBD server over several connections, and what happens when they break.

                activate()              connected
    inactive ──────────────▶ down ───────────────────▶ up
        ▲                     ▲   requests wait here,    │ requests go out, to the least busy connection
        │                     │   ``reconnect`` s long   │
        └── deactivate() ─────┴─────── a connection broke, or an interlude

Requests that got no answer are sent again over the next connections: all of NBD's commands may be done twice. While
the server is away for longer than ``reconnect``, requests fail at once, and connecting is tried all the same.

A thread of the client's makes connections and clears up behind them. Replies are taken in the event loop's thread
once :meth:`Client.use` has told of it, before that by a thread for each connection.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from vmbus.errors import DeviceError
from vmbus.ports import Workers

from vmbus_devices.nbd.connection import Connection, Request
from vmbus_devices.nbd.handshake import Export, NbdError, negotiate
from vmbus_devices.nbd.uri import Address
from vmbus_devices.nbd.wire import Command, ExportFlag

_logger = logging.getLogger(__name__)

_FIRST_RETRY = 0.05
_LAST_RETRY = 1.0
"""Seconds between two attempts to connect: doubled from the first to the last."""
OPEN_LIMIT = 60.0
STALL_LIMIT = 120.0
"""Seconds without any answer after which connections are taken for broken."""
INTERLUDE_LIMIT = 600.0


def _nothing() -> None:
    """An interlude of which only the interruption is wanted."""


class Connector(Protocol):
    """Who makes connections. All of it is called in the client's own thread, and may block for some seconds."""

    export: str
    """The name to ask for."""

    def connect(self, number: int) -> socket.socket:
        """Connection ``number`` (from 0) of a session. Raises ``OSError``, :class:`DeviceError`."""

    def ended(self) -> None:
        """The session is over: none of its connections is open any more."""


class AddressConnector:
    """Connections to a server that somebody else runs."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.export = address.export

    def connect(self, number: int) -> socket.socket:
        return self.address.connect()

    def ended(self) -> None:
        """Nothing is kept."""


class Client:
    """``name``: for messages; ``connections``: at most, where the server allows several; ``reconnect``: seconds."""

    def __init__(
        self, connector: Connector, name: str, *, connections: int = 4, reconnect: float = 5.0
    ) -> None:
        self.name = name
        self.export: Export | None = None
        self.sessions = 0
        #: Why there is no connection; empty if nothing is wrong.
        self.trouble = ""
        self._connector = connector
        self._most = connections
        self._reconnect = reconnect
        self._changed = threading.Condition()
        self._wanted = False
        self._closing = False
        self._session: list[Connection] = []
        self._broken: Exception | None = None
        self._away_since: float | None = None
        self._waiting: deque[Request] = deque()
        self._interlude: Callable[[], None] | None = None
        self._workers: Workers | None = None
        self._thread = threading.Thread(target=self._run, name=f"nbd {name}", daemon=True)
        self._thread.start()

    # --- for everybody -----------------------------------------------------------------------------------------

    def open(self) -> Export:
        """Connect, and wait for it. Raises :class:`~vmbus.errors.DeviceError`, and has closed itself then."""
        self.activate()
        with self._changed:
            self._changed.wait_for(lambda: self._session or self.trouble, OPEN_LIMIT)
            if self._session and self.export is not None:
                return self.export
            trouble = self.trouble or f"no answer within {OPEN_LIMIT:g} s"
        self.close()
        raise DeviceError(f"{self.name}: {trouble}")

    def activate(self) -> None:
        """Connect, and stay connected. Does not wait."""
        with self._changed:
            self._wanted = True
            self._away_since = None
            self._changed.notify_all()

    def use(self, workers: Workers) -> None:
        """Take replies in an event loop from now on: connections are made anew. Does not wait."""
        with self._changed:
            self._workers = workers
            if not self._closing and self._interlude is None:
                self._interlude = _nothing
                self._changed.notify_all()

    def deactivate(self) -> None:
        """Disconnect. Does not wait; no request is under way."""
        with self._changed:
            self._wanted = False
            self._changed.notify_all()

    def close(self) -> None:
        """Disconnect for good; what is under way fails. Does not wait."""
        with self._changed:
            self._wanted = False
            self._closing = True
            self._changed.notify_all()

    def join(self, limit: float) -> bool:
        """Wait until :meth:`close` is done; whether it is."""
        self._thread.join(limit)
        return not self._thread.is_alive()

    def interlude(self, work: Callable[[], None]) -> None:
        """Call ``work`` while there is no connection; requests wait meanwhile. Raises what it raises."""
        done = threading.Event()
        errors: list[Exception] = []

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                errors.append(error)
            done.set()

        with self._changed:
            if self._closing or self._interlude is not None:
                raise DeviceError(f"{self.name} is busy, or about to be closed")
            self._interlude = run
            self._changed.notify_all()
        if not done.wait(INTERLUDE_LIMIT):
            raise DeviceError(f"{self.name}: not done within {INTERLUDE_LIMIT:g} s")
        if errors:
            raise errors[0]

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._session)

    def submit(self, request: Request) -> None:
        """Have ``request`` done; never blocks. ``request.done`` may be called before this returns."""
        with self._changed:
            if not self._closing and not self._gone():
                session = self._session
                if session:
                    connection = session[0]
                    if len(session) > 1:
                        connection = min(session, key=lambda each: len(each.requests))
                    if connection.send(request):
                        return
                self._waiting.append(request)
                if self._away_since is not None:
                    self._set_deadline(request)
                return
        request.done(OSError(errno.EIO, self.trouble or f"{self.name} is closed"))

    def call(
        self, command: Command, offset: int, length: int, views: list[memoryview], flags: int
    ) -> Request:
        """Do a request and wait for it. Raises ``OSError``."""
        done = threading.Event()
        errors: list[OSError] = []

        def ended(error: OSError | None) -> None:
            if error is not None:
                errors.append(error)
            done.set()

        request = Request(command, offset, length, ended, views, flags)
        self.submit(request)
        done.wait()
        if errors:
            raise errors[0]
        return request

    # --- in the client's thread --------------------------------------------------------------------------------

    def _gone(self) -> bool:
        """Whether the server has been away for so long that nobody should wait for it."""
        return self._away_since is not None and time.monotonic() - self._away_since >= self._reconnect

    def _set_deadline(self, request: Request) -> None:
        if request.deadline is None:
            request.deadline = time.monotonic() + self._reconnect

    def _run(self) -> None:
        retry = _FIRST_RETRY
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing or self._interlude is not None)
                closing, work = self._closing, self._interlude
            if work is not None:
                work()
                with self._changed:
                    self._interlude = None
                    if not self._wanted:
                        continue
            if closing:
                break
            try:
                session = self._connect()
            except (OSError, DeviceError) as error:
                self._connector.ended()
                self._could_not_connect(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or not self._wanted, retry)
                retry = min(2 * retry, _LAST_RETRY)
                self._expire()
                continue
            begun = time.monotonic()
            self._serve(session)
            if self.trouble and time.monotonic() - begun < _LAST_RETRY:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or not self._wanted, retry)
                retry = min(2 * retry, _LAST_RETRY)
            else:
                retry = _FIRST_RETRY
            self._expire()
        self._expire(everything=True)

    def _connect(self) -> list[Connection]:
        session: list[Connection] = []
        try:
            while True:
                stream = self._connector.connect(len(session))
                try:
                    export = negotiate(stream, self._connector.export)
                except TimeoutError as error:
                    stream.close()
                    raise NbdError(
                        "the server does not answer; does it take several clients (qemu-nbd: --shared)?"
                    ) from error
                except BaseException:
                    stream.close()
                    raise
                if self.export is not None and export.minimum > self.export.minimum:
                    stream.close()
                    raise NbdError(f"the server wants blocks of {export.minimum} bytes now")
                session.append(Connection(stream, export))
                if not export.flags & ExportFlag.MULTI_CONNECTION or len(session) >= self._most:
                    break
        except BaseException:
            for connection in session:
                connection.end()
                connection.close()
            raise
        return session

    def _could_not_connect(self, error: Exception) -> None:
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        with self._changed:
            if reason != self.trouble:
                _logger.warning("%s: %s", self.name, reason)
            self.trouble = reason
            self._be_away()
            self._changed.notify_all()

    def _be_away(self) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
        for request in self._waiting:
            self._set_deadline(request)

    def _serve(self, session: list[Connection]) -> None:
        """Be up until a connection breaks, or something else is wanted."""
        with self._changed:
            if self.trouble:
                _logger.warning("%s: connected", self.name)
            self.export = session[0].export
            self.sessions += 1
            self.trouble = ""
            self._broken = None
            self._away_since = None
            self._session = session
            for index, request in enumerate(self._waiting):
                session[index % len(session)].send(request)
            self._waiting.clear()
            self._changed.notify_all()
        receivers = []
        for connection in session:
            if self._workers is None or not connection.watch(self._workers, self._lost):
                receivers.append(
                    threading.Thread(
                        target=self._receive, args=(connection,), name="nbd-receiver", daemon=True
                    )
                )
                receivers[-1].start()
        self._watch(session)
        with self._changed:
            self._session = []
        for connection in session:
            connection.end()
        for thread in receivers:
            thread.join()
        left = [request for connection in session for request in connection.close()]
        self._connector.ended()
        with self._changed:
            self._waiting.extendleft(reversed(left))
            if self._broken is not None and self._wanted and not self._interlude:
                self.trouble = str(self._broken)
                _logger.warning("%s: %s", self.name, self.trouble)
                self._be_away()

    def _watch(self, session: list[Connection]) -> None:
        """Wait until there is something to do, or the server has not answered for :data:`STALL_LIMIT`."""
        seen = {each: (each.replies, time.monotonic()) for each in session}
        with self._changed:
            while not (self._broken or self._closing or not self._wanted or self._interlude):
                self._changed.wait(STALL_LIMIT / 8)
                now = time.monotonic()
                for each, (replies, _) in tuple(seen.items()):
                    if each.replies != replies or not each.requests:
                        seen[each] = (each.replies, now)
                if any(now - since > STALL_LIMIT for _, since in seen.values()):
                    self._broken = NbdError(f"the server has not answered for {STALL_LIMIT:g} s")

    def _receive(self, connection: Connection) -> None:
        error: Exception = NbdError("the receiver of replies failed")
        try:
            error = connection.serve()
        except Exception:
            _logger.exception("%s: please report this", self.name)
        self._lost(connection, error)

    def _lost(self, connection: Connection, error: Exception) -> None:
        with self._changed:
            if connection in self._session and self._broken is None:
                self._broken = error
                self._changed.notify_all()

    def _expire(self, *, everything: bool = False) -> None:
        """Let requests fail that have waited for long enough."""
        now = time.monotonic()
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            due: list[Request] = []
            for request in waiting:
                late = request.deadline is not None and request.deadline <= now
                (due if everything or late else self._waiting).append(request)
        for request in due:
            if everything:
                request.views.clear()  # nobody keeps a hold on guest memory
            request.done(OSError(errno.EIO, self.trouble or f"{self.name} is closed"))
