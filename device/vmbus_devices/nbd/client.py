"""One export of an NBD server over several connections, which are replaced when they break.

                activate()              connected
    inactive ──────────────▶ down ───────────────────▶ up
        ▲                     ▲   requests wait here,    │ requests are sent, on the least busy connection
        │                     │   ``reconnect`` seconds  │
        └── deactivate() ─────┴─────── a connection broke, or an interlude

Requests without an answer are sent again over the next connections: all of NBD's commands may be executed twice.
When the server has been lost for longer than ``reconnect``, requests fail at once, while the client keeps connecting.

A thread of the client makes connections and closes them. Replies are received in the event loop's thread after
:meth:`Client.use`, before that by a thread for each connection.
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

from vmbus.errors import DeviceError, UserError
from vmbus.ports import Workers

from vmbus_devices.nbd.connection import Connection, Request
from vmbus_devices.nbd.handshake import Export, NbdError, negotiate
from vmbus_devices.nbd.uri import Address
from vmbus_devices.nbd.wire import Command, ExportFlag

_logger = logging.getLogger(__name__)

_FIRST_RETRY = 0.05
_LAST_RETRY = 1.0
"""Seconds between two attempts to connect: doubled each time, from the first value to the last."""
OPEN_TIMEOUT = 60.0
"""Seconds for the first connection."""
STALL_TIMEOUT = 120.0
"""Seconds without any answer, or without that of a request whose successors are answered, after which connections
count as broken."""
INTERLUDE_TIMEOUT = 600.0
"""Seconds for the work of an interlude."""


def _nothing() -> None:
    """Do nothing: an interlude that only replaces the connections."""


class Connector(Protocol):
    """Makes connections. All methods are called in the client's thread, and may block for some seconds."""

    export: str
    """The name of the export."""

    def connect(self, number: int) -> socket.socket:
        """Return connection ``number`` (from 0) of a session. Raises ``OSError``, :class:`DeviceError`."""

    def activity(self) -> tuple[int, int]:
        """Return what the server does beside the connections: requests answered so far, and those under way."""

    def oldest(self) -> float | None:
        """As :meth:`Connection.oldest`, of what the server does beside the connections."""

    def overtaken(self) -> float | None:
        """As :meth:`Connection.overtaken`, of what the server does beside the connections."""

    def give_up(self, why: str) -> None:
        """Have later sessions use the connections alone."""

    def ended(self) -> None:
        """Called after a session, when all its connections are closed."""


class AddressConnector:
    """Connections to a server at an address."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.export = address.export

    def connect(self, number: int) -> socket.socket:
        return self.address.connect()

    def activity(self) -> tuple[int, int]:
        return 0, 0

    def oldest(self) -> float | None:
        return None

    def overtaken(self) -> float | None:
        return None

    def give_up(self, why: str) -> None:
        """Do nothing: connections are all that there is."""

    def ended(self) -> None:
        """Do nothing: connections are all that there is."""


class Client:
    """A client of one export.

    ``name``: for messages; ``connections``: at most, where the server allows several; ``reconnect``: seconds for
    which requests wait for a lost server. Raises :class:`~vmbus.errors.UserError` where no thread can be started.
    """

    def __init__(
        self, connector: Connector, name: str, *, connections: int = 4, reconnect: float = 5.0
    ) -> None:
        self.name = name
        self.export: Export | None = None
        self.sessions = 0
        self.trouble = ""
        """Why there is no connection; empty if nothing is wrong."""
        self._opening = False
        """A caller waits for the connection, and will report why there is none."""
        self._reported = False
        """Whether :attr:`trouble` was logged."""
        self._connector = connector
        self._max_connections = connections
        self._reconnect = reconnect
        self._changed = threading.Condition()
        self._wanted = False
        self._closing = False
        self._session: list[Connection] = []
        self._broken: Exception | None = None
        self._given_up: Exception | None = None
        """Why the session that is being made is not to be used."""
        self._lost_since: float | None = None
        self._waiting: deque[Request] = deque()
        self._interlude: Callable[[], None] | None = None
        self._workers: Workers | None = None
        self._thread = threading.Thread(target=self._run, name=f"nbd {name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise UserError(
                f"{name} cannot be connected: {error}; raise the limit of processes and threads (ulimit -u, or "
                "that of the container), or end other programs"
            ) from error

    # --- in any thread ---

    def open(self) -> Export:
        """Connect and wait for the connection. Raises :class:`~vmbus.errors.DeviceError`, after a close."""
        try:
            self.connect(0.0)
            if self.export is not None:
                return self.export
            raise DeviceError("the server is lost again")
        except DeviceError as error:
            self.close()
            raise DeviceError(f"{self.name}: {error}") from error

    def connect(self, timeout: float) -> None:
        """Connect, and try again for ``timeout`` seconds; raise :class:`~vmbus.errors.DeviceError` after that.

        A first attempt that is under way is waited for, up to :data:`OPEN_TIMEOUT`. The client stays active.
        """
        self._opening = True
        self.activate()
        with self._changed:
            self._changed.wait_for(lambda: self._session or self.trouble, OPEN_TIMEOUT)
            connected = self._changed.wait_for(lambda: bool(self._session), timeout)
            self._opening = False
            if not connected:
                raise DeviceError(self.trouble or f"the server did not answer within {OPEN_TIMEOUT:g} s")

    def activate(self) -> None:
        """Connect and stay connected. Does not wait."""
        with self._changed:
            self._wanted = True
            self._lost_since = None
            self._changed.notify_all()

    def use(self, workers: Workers) -> None:
        """Receive replies in an event loop from now on; connections are replaced for that. Does not wait."""
        with self._changed:
            self._workers = workers
            if not self._closing and self._interlude is None:
                self._interlude = _nothing
                self._changed.notify_all()

    def deactivate(self) -> None:
        """Disconnect. Does not wait. No request may be under way."""
        with self._changed:
            self._wanted = False
            self._changed.notify_all()

    def close(self) -> None:
        """Disconnect for good; requests under way fail. Does not wait; see :meth:`wait_closed`."""
        with self._changed:
            self._wanted = False
            self._closing = True
            self._changed.notify_all()

    def wait_closed(self, timeout: float) -> bool:
        """Wait for outstanding work after :meth:`close`; return False on timeout (seconds)."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def lose(self, error: Exception) -> None:
        """Give up the present session, or the one that is being made: its server is not to be used. Does not wait."""
        with self._changed:
            self._given_up = error
            if self._session and self._broken is None:
                self._broken = error
                self._changed.notify_all()

    def interlude(self, work: Callable[[], None]) -> None:
        """Call ``work`` while there is no connection; requests wait meanwhile. Raises what ``work`` raises.

        Raises :class:`~vmbus.errors.DeviceError` while another interlude is under way, or after a close.
        """
        done = threading.Event()
        errors: list[Exception] = []

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                errors.append(error)
            done.set()

        with self._changed:
            if self._closing or self._interlude is not None:
                raise DeviceError(f"{self.name} is being reconnected or closed; try again later")
            self._interlude = run
            self._changed.notify_all()
        if not done.wait(INTERLUDE_TIMEOUT):
            raise DeviceError(f"{self.name}: the server was not reconnected within {INTERLUDE_TIMEOUT:g} s")
        if errors:
            raise errors[0]

    @property
    def connections(self) -> int:
        """Number of connections."""
        return len(self._session)

    @property
    def waited(self) -> float:
        """Seconds that the oldest request without an answer has waited for the server; 0 if there is none."""
        ways: tuple[Connection | Connector, ...] = (*self._session, self._connector)
        sent = [at for each in ways if (at := each.oldest()) is not None]
        return time.monotonic() - min(sent) if sent else 0.0

    def submit(self, request: Request) -> None:
        """Execute ``request``; does not block. ``request.done`` may be called before this returns."""
        with self._changed:
            if not self._closing and not self._lost_for_long():
                session = self._session
                if session:
                    connection = session[0]
                    if len(session) > 1:
                        connection = min(session, key=lambda each: len(each.requests))
                    if connection.send(request):
                        return
                self._waiting.append(request)
                if self._lost_since is not None:
                    self._set_deadline(request)
                return
        request.done(OSError(errno.EIO, self.trouble or f"{self.name} is closed"))

    def call(
        self, command: Command, offset: int, length: int, views: list[memoryview], flags: int
    ) -> Request:
        """Execute a request and wait for it. Raises ``OSError``."""
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

    # --- in the client's thread ---

    def _lost_for_long(self) -> bool:
        """Return whether the server has been lost for longer than requests wait."""
        return self._lost_since is not None and time.monotonic() - self._lost_since >= self._reconnect

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
            self._given_up = None
            try:
                session = self._connect()
            except Exception as error:
                # Requests wait for this thread, whatever happens in it.
                if not isinstance(error, (OSError, DeviceError)) and str(error) != self.trouble:
                    _logger.exception("%s: the connection failed; please report this", self.name)
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
                        "the server does not answer; it may have to accept more clients (qemu-nbd --shared=0)"
                    ) from error
                except BaseException:
                    stream.close()
                    raise
                if self.export is not None and export.minimum > self.export.minimum:
                    stream.close()
                    raise NbdError(
                        f"the server now needs blocks of {export.minimum} bytes, larger than before"
                    )
                session.append(Connection(stream, export))
                if not export.flags & ExportFlag.MULTI_CONNECTION or len(session) >= self._max_connections:
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
            if reason != self.trouble and not self._opening:
                _logger.warning("%s: %s", self.name, reason)
                self._reported = True
            self.trouble = reason
            self._mark_lost()
            self._changed.notify_all()

    def _mark_lost(self) -> None:
        if self._lost_since is None:
            self._lost_since = time.monotonic()
        for request in self._waiting:
            self._set_deadline(request)

    def _serve(self, session: list[Connection]) -> None:
        """Use the connections until one breaks, or until the client is deactivated or closed."""
        with self._changed:
            if self.trouble and self._reported:
                _logger.warning("%s: connected", self.name)
                self._reported = False
            self.export = session[0].export
            self.sessions += 1
            self.trouble = ""
            self._broken = self._given_up
            self._lost_since = None
            self._session = session
            for index, request in enumerate(self._waiting):
                session[index % len(session)].send(request)
            self._waiting.clear()
            self._changed.notify_all()
        receivers = []
        for connection in session:
            if self._workers is None or not connection.watch(self._workers, self._lost):
                thread = threading.Thread(
                    target=self._receive, args=(connection,), name="nbd-receiver", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:
                    self._lost(connection, error)
                else:
                    receivers.append(thread)
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
                self._reported = True
                self._mark_lost()

    def _watch(self, session: list[Connection]) -> None:
        """Wait for the end of a session, or until the server has not answered for :data:`STALL_TIMEOUT`."""
        seen = {each: (each.replies, time.monotonic()) for each in session}
        answered, answered_at = self._connector.activity()[0], time.monotonic()
        ways: tuple[Connection | Connector, ...] = (*session, self._connector)
        with self._changed:
            while not (self._broken or self._closing or not self._wanted or self._interlude):
                self._changed.wait(STALL_TIMEOUT / 8)
                now = time.monotonic()
                for each, (replies, _) in tuple(seen.items()):
                    if each.replies != replies or not each.requests:
                        seen[each] = (each.replies, now)
                replies, under_way = self._connector.activity()
                if replies != answered or not under_way:
                    answered, answered_at = replies, now
                if any(
                    now - since > STALL_TIMEOUT for since in (answered_at, *(at for _, at in seen.values()))
                ):
                    self._broken = NbdError(f"the server has not answered for {STALL_TIMEOUT:g} s")
                elif any(_overtaken_for_long(each, now) for each in ways):
                    self._broken = NbdError(
                        f"the server has not answered a request for {STALL_TIMEOUT:g} s, while it answered others"
                    )
                    if _overtaken_for_long(self._connector, now):
                        self._connector.give_up(str(self._broken))

    def _receive(self, connection: Connection) -> None:
        error: Exception = NbdError("the receiver of replies failed")
        try:
            error = connection.serve()
        except Exception:
            _logger.exception("%s: the receiver of replies failed; please report this", self.name)
        self._lost(connection, error)

    def _lost(self, connection: Connection, error: Exception) -> None:
        with self._changed:
            if connection in self._session and self._broken is None:
                self._broken = error
                self._changed.notify_all()

    def _expire(self, *, everything: bool = False) -> None:
        """Let requests fail that have waited too long, or all of them."""
        now = time.monotonic()
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            due: list[Request] = []
            for request in waiting:
                late = request.deadline is not None and request.deadline <= now
                (due if everything or late else self._waiting).append(request)
        for request in due:
            if everything:
                request.views.clear()  # views keep guest memory mapped
            request.done(OSError(errno.EIO, self.trouble or f"{self.name} is closed"))


def _overtaken_for_long(way: Connection | Connector, now: float) -> bool:
    """Return whether a request has waited for :data:`STALL_TIMEOUT` while others were answered."""
    since = way.overtaken()
    return since is not None and now - since > STALL_TIMEOUT
