"""The qtest socket of a running QEMU: interrupts into the guest, and writes that QEMU itself executes.

qtest is QEMU's own device test protocol (``docs/devel/testing/qtest.rst`` in QEMU): one line a command, answered
by ``OK`` or ``FAIL``. It works beside ``-accel tcg`` while the guest runs. Two commands are used:

* ``writel 0xfee00000|apic_id<<12 vector``: an MSI, hence a fixed, edge-triggered interrupt;
* ``b64write address length data``: a write of guest memory after which QEMU drops translated code and marks
  the pages dirty.

Interrupts are posted without waiting for their ``OK``. The answers are counted, and read when there are some, so that
QEMU never blocks on a full socket.

QEMU's main loop answers, and it may be busy for long: it sends the rest of memory, or saves a machine. What has to
wait for it does so in one of two ways:

    :meth:`Qtest.settled`, :meth:`Qtest.marked`     as a task; the event loop does other things
    :meth:`Qtest.write_memory`, :meth:`Qtest.mark`, the event loop waits: the caller stores into guest memory, and the
    :meth:`Qtest.settle`                            guest must not see more before QEMU has done its part

Nothing that QEMU's main loop waits for may depend on an event loop that waits for QEMU's main loop.
:class:`MainLoopWaits` tells other threads of such a wait; :mod:`vmbus.machine.migration.vmstate` answers QEMU then.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from vmbus.errors import QemuError, QemuGone, QemuUnsuitable

_logger = logging.getLogger(__name__)

ANSWER_TIMEOUT = 300.0
"""Seconds that QEMU's main loop may take to answer before QEMU counts as gone. To save or send memory takes long."""
_WARN_AFTER = 10.0
"""Seconds after which a line in the log says what the emulator waits for."""

_MSI_BASE = 0xFEE00000
_READ_ANSWERS_AT = 32
_WRITE_CHUNK = 16 << 10
_MARKS = 2000  # the answers to these fit into any socket's buffer


class MainLoopWaits:
    """Whether the event loop waits for QEMU's main loop; for use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers: list[Callable[[], None]] = []
        self._waiting = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the event loop waits, until the end of the block."""
        with self._lock:
            self._waiting = True
            watchers = tuple(self._watchers)
        for watcher in watchers:
            watcher()
        try:
            yield
        finally:
            with self._lock:
                self._waiting = False

    @contextlib.contextmanager
    def watched(self, begins: Callable[[], None]) -> Iterator[None]:
        """Call ``begins`` if the event loop waits now, and in its thread whenever it begins to, until the end."""
        with self._lock:
            self._watchers.append(begins)
            waiting = self._waiting
        if waiting:
            begins()
        try:
            yield
        finally:
            with self._lock:
                self._watchers.remove(begins)


class OtherWriter(Protocol):
    """A thread that writes interrupts to the same socket, a line each, and leaves the answers to :class:`Qtest`."""

    @property
    def lines(self) -> int:
        """Lines that it has begun to write so far."""

    def lock_lines(self) -> None:
        """Keep it from writing: a line must not land inside another one."""

    def unlock_lines(self) -> None:
        """End that."""


class Qtest:
    """A connection to the qtest socket; not for use from several threads, but for :attr:`other`."""

    def __init__(self, connection: socket.socket, *, timeout: float = ANSWER_TIMEOUT) -> None:
        """``timeout``: seconds that QEMU's main loop may take to answer before QEMU counts as gone."""
        self._socket = connection
        self._timeout = timeout
        self._sent = self._answered = 0
        self._buffer = b""
        self._lines: dict[tuple[int, int], bytes] = {}
        self._settling: list[tuple[int, asyncio.Future[None]]] = []
        """How many answers are waited for, since the connection was made, and by whom."""
        self._loading = False
        self.other: OtherWriter | None = None
        self.interrupts = 0
        self.waits = MainLoopWaits()

    @classmethod
    def connect(cls, path: str, *, timeout: float = ANSWER_TIMEOUT) -> Qtest:
        """Connect to ``path``. Raises :class:`~vmbus.errors.QemuUnsuitable` when nothing listens there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise QemuUnsuitable(
                f"cannot connect to QEMU's qtest socket {path}: {error.strerror}; is another emulator attached?"
            ) from error
        return cls(connection, timeout=timeout)

    @classmethod
    def adopt(cls, descriptor: int) -> Qtest:
        """Continue a connection of another process, all of whose commands were answered; takes the descriptor."""
        return cls(socket.socket(fileno=descriptor))

    def close(self) -> None:
        """Close the connection; the guest does not notice."""
        self._end_settling(QemuGone("the qtest socket was closed"))
        self._socket.close()

    @property
    def _asked(self) -> int:
        """Commands that were sent so far, by whomever; QEMU answers them in order."""
        return self._sent + (self.other.lines if self.other is not None else 0)

    @property
    def unanswered(self) -> int:
        """Commands that were sent, by whomever, and whose answers were not read."""
        return self._asked - self._answered

    def interrupt(self, apic_id: int, vector: int) -> None:
        """Post an MSI with ``vector`` to the local APIC ``apic_id`` (0..255)."""
        self.interrupts += 1
        self._send(self.line(apic_id, vector))

    def line(self, apic_id: int, vector: int) -> bytes:
        """Return the command of :meth:`interrupt`, for :attr:`other`."""
        line = self._lines.get((apic_id, vector))
        if line is None:
            line = b"writel 0x%x 0x%x\n" % (_MSI_BASE | apic_id << 12, vector)
            self._lines[apic_id, vector] = line
        return line

    def fileno(self) -> int:
        """Return the socket's descriptor, for :attr:`other`."""
        return self._socket.fileno()

    def end_other(self) -> None:
        """Forget :attr:`other`, which writes nothing any more."""
        if self.other is not None:
            other, self.other = self.other, None
            self._sent += other.lines

    def write_memory(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest memory through QEMU; return when it has been written.

        During :meth:`loading` this does nothing: QEMU waits, and drops all translated code of its own accord.
        """
        if self._loading:
            return
        for start in range(0, len(data), _WRITE_CHUNK):
            chunk = data[start : start + _WRITE_CHUNK]
            self._send(b"b64write 0x%x 0x%x %s\n" % (gpa + start, len(chunk), base64.b64encode(chunk)))
        self.settle()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Restore a guest in the block, while QEMU's main loop waits for that."""
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    def mark(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        """Write each ``(address, byte)``; return when all are written.

        For pages that were written through the mapping: the byte is the one that is there, so only QEMU's log of
        dirty pages changes. If the guest may write the byte, it must not run: its store would be lost.
        """
        for start in range(0, len(bytes_there), _MARKS):
            self._post_marks(bytes_there[start : start + _MARKS])
            self.settle()

    async def marked(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        """Do the same as :meth:`mark`, and wait as a task."""
        for start in range(0, len(bytes_there), _MARKS):
            self._post_marks(bytes_there[start : start + _MARKS])
            await self.settled()

    async def settled(self) -> None:
        """Wait until QEMU has executed all commands so far. Raises :class:`~vmbus.errors.QemuGone` on timeout."""
        asked = self._asked
        if self._answered >= asked:
            return
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if not self._settling:
            loop.add_reader(self._socket.fileno(), self._readable)
        entry = (asked, done)
        self._settling.append(entry)
        try:
            async with asyncio.timeout(self._timeout):
                await done
        except TimeoutError:
            raise self._not_answered() from None
        finally:
            if entry in self._settling:
                self._settling.remove(entry)
                if not self._settling:
                    loop.remove_reader(self._socket.fileno())

    def _readable(self) -> None:
        try:
            self._read_answers()
        except QemuError as error:
            self._end_settling(error)

    def _end_settling(self, error: QemuError | None = None) -> None:
        """Answer those who wait for no more than what was answered; with ``error``, all."""
        settling = [each for each in self._settling if error is not None or each[0] <= self._answered]
        if settling:
            self._settling = [each for each in self._settling if each not in settling]
            if not self._settling:
                settling[0][1].get_loop().remove_reader(self._socket.fileno())
        for _, done in settling:
            if done.done():
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def settle(self) -> None:
        """Do the same as :meth:`settled`; nothing else happens in this thread meanwhile."""
        asked = self._asked
        if self._answered >= asked:
            return
        with self.waits.waiting():
            wait = _Wait(self._timeout)
            while self._answered < asked:
                if not wait.step([self._socket], []):
                    raise self._not_answered()
                self._read_answers()

    def _not_answered(self) -> QemuGone:
        return QemuGone(f"QEMU's main loop has not answered on the qtest socket for {self._timeout:g} s")

    def _post_marks(self, part: Sequence[tuple[int, int]]) -> None:
        self._sent += len(part) - 1
        self._send(b"".join([b"writeb 0x%x 0x%x\n" % each for each in part]))

    def _send(self, line: bytes) -> None:
        other = self.other
        if other is None:
            self._write(line)
            return
        other.lock_lines()
        try:
            self._write(line)
        finally:
            other.unlock_lines()

    def read_answers(self) -> None:
        """Read the answers that are there: for :attr:`other`, which does not."""
        self._read_answers()

    def _write(self, line: bytes) -> None:
        self._sent += 1
        try:
            sent = self._socket.send(line, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._closed(error) from error
        if sent < len(line):
            self._send_rest(memoryview(line)[sent:])
        elif self._asked - self._answered >= _READ_ANSWERS_AT:
            self._read_answers()

    def _send_rest(self, rest: memoryview) -> None:
        """Send what does not fit into the socket now: QEMU's main loop is busy."""
        with self.waits.waiting():
            wait = _Wait(self._timeout)
            while rest:
                if not wait.step([self._socket], [self._socket]):
                    raise self._not_answered()
                self._read_answers()
                try:
                    rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise self._closed(error) from error

    def _closed(self, error: OSError) -> QemuGone:
        return QemuGone(f"QEMU closed the qtest socket: {error.strerror}")

    def _read_answers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                raise
            except OSError as error:
                raise self._closed(error) from error
            if not data:
                raise QemuGone("QEMU closed the qtest socket")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for answer in lines:
                if answer.startswith(b"OK"):
                    self._answered += 1
                elif not answer.startswith(b"IRQ"):
                    raise QemuError(f"QEMU refused a qtest command: {answer.decode('ascii', 'replace')}")
            self._end_settling()


class _Wait:
    """A wait of this thread for QEMU's main loop, with a line in the log if it is long."""

    def __init__(self, timeout: float) -> None:
        """``timeout``: in seconds."""
        self._begun = time.monotonic()
        self._timeout = timeout
        self._warned = False

    def step(self, readers: Sequence[socket.socket], writers: Sequence[socket.socket]) -> bool:
        """Wait until a socket is ready; return False on timeout."""
        while True:
            passed = time.monotonic() - self._begun
            if passed >= self._timeout:
                return False
            until = self._timeout if self._warned else min(_WARN_AFTER, self._timeout)
            found = select.select(readers, writers, [], max(until - passed, 0))
            if found[0] or found[1]:
                return True
            if not self._warned and time.monotonic() - self._begun >= _WARN_AFTER:
                self._warned = True
                _logger.warning(
                    "QEMU's main loop has not answered for %g s: it saves or sends memory, or hangs; the "
                    "emulator waits for it",
                    _WARN_AFTER,
                )


class PollingVcpus(Protocol):
    """vCPUs that raise interrupts by themselves while they poll for them."""

    def post(self, vcpu: int, vector: int) -> bool:
        """Leave ``vector`` to the vCPU; False if it does not poll."""

    def take_back(self, vcpu: int, vector: int) -> bool:
        """Withdraw what was left to it; False if it was taken since."""


class LocalApics:
    """:class:`~vmbus.ports.Interrupts`: MSIs to the guest's local APICs, by a vCPU that polls or through qtest."""

    def __init__(
        self,
        qtest: Qtest,
        apic_ids: Sequence[int],
        gone: Callable[[QemuGone], None],
        vcpus: PollingVcpus | None = None,
    ) -> None:
        """``gone``: called when QEMU has closed the socket; later requests have no effect."""
        self._qtest = qtest
        self.apic_ids = tuple(apic_ids)
        self._gone = gone
        self._vcpus = vcpus
        self.requests = 0

    def request(self, vp: int, vector: int, *, auto_eoi: bool = False) -> None:
        # The gateway ends auto-EOI interrupts by itself: see Host._Events.auto_eoi_changed.
        self.requests += 1
        if self._vcpus is None or not self._vcpus.post(vp, vector):
            self._send(vp, vector)

    def retry(self, waiting: Sequence[tuple[int, int]]) -> None:
        """Raise through QEMU the ``(vp, vector)`` that their vCPUs could not raise by themselves."""
        for vp, vector in waiting:
            if self._vcpus is not None and self._vcpus.take_back(vp, vector):
                self._send(vp, vector)

    def _send(self, vp: int, vector: int) -> None:
        try:
            self._qtest.interrupt(self.apic_ids[vp], vector)
        except QemuGone as error:  # the caller, a device at work, cannot handle that
            self._gone(error)
