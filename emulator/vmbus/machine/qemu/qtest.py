"""The qtest socket of a running QEMU: interrupts into the guest, and writes that QEMU itself executes.

qtest is QEMU's own device test protocol (``docs/devel/testing/qtest.rst`` in QEMU): one line a command, answered
by ``OK`` or ``FAIL``. It works beside ``-accel tcg`` while the guest runs. Two commands are used:

* ``writel 0xfee00000|apic_id<<12 vector``: an MSI, hence a fixed, edge-triggered interrupt;
* ``b64write address length data``: a write of guest memory after which QEMU drops translated code and marks
  the pages dirty.

Interrupts are posted without waiting for their ``OK``. The answers are counted, and read when there are some, so that
QEMU never blocks on a full socket.
"""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence

from vmbus.errors import QemuError, QemuGone, QemuUnsuitable

_MSI_BASE = 0xFEE00000
_READ_ANSWERS_AT = 32
_WRITE_CHUNK = 16 << 10
_MARKS = 2000  # the answers to these fit into any socket's buffer


class Qtest:
    """A connection to the qtest socket; not for use from several threads."""

    def __init__(self, connection: socket.socket, *, timeout: float = 10.0) -> None:
        """``timeout``: seconds that QEMU's main loop may take to answer before QEMU counts as gone."""
        self._socket = connection
        self._timeout = timeout
        self._unanswered = 0
        self._buffer = b""
        self._lines: dict[tuple[int, int], bytes] = {}
        self.interrupts = 0

    @classmethod
    def connect(cls, path: str, *, timeout: float = 10.0) -> Qtest:
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

    def close(self) -> None:
        """Close the connection; the guest does not notice."""
        self._socket.close()

    def interrupt(self, apic_id: int, vector: int) -> None:
        """Post an MSI with ``vector`` to the local APIC ``apic_id`` (0..255)."""
        line = self._lines.get((apic_id, vector))
        if line is None:
            line = b"writel 0x%x 0x%x\n" % (_MSI_BASE | apic_id << 12, vector)
            self._lines[apic_id, vector] = line
        self.interrupts += 1
        self._send(line)

    def write_memory(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest memory through QEMU; return when it has been written."""
        for start in range(0, len(data), _WRITE_CHUNK):
            chunk = data[start : start + _WRITE_CHUNK]
            self._send(b"b64write 0x%x 0x%x %s\n" % (gpa + start, len(chunk), base64.b64encode(chunk)))
        self.settle()

    def mark(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        """Write each ``(address, byte)``; return when all are written.

        For pages that were written through the mapping: the byte is the one that is there, so only QEMU's log of
        dirty pages changes. If the guest may write the byte, it must not run: its store would be lost.
        """
        for start in range(0, len(bytes_there), _MARKS):
            part = bytes_there[start : start + _MARKS]
            lines = b"".join([b"writeb 0x%x 0x%x\n" % each for each in part])
            self._unanswered += len(part) - 1
            self._send(lines)
            self.settle()

    def settle(self) -> None:
        """Wait until QEMU has executed all commands so far. Raises :class:`~vmbus.errors.QemuGone` on timeout."""
        end = time.monotonic() + self._timeout
        while self._unanswered:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise QemuGone(
                    f"QEMU's main loop has not answered on the qtest socket for {self._timeout:g} s"
                )
            self._read_answers()

    def _send(self, line: bytes) -> None:
        try:
            self._socket.sendall(line)
        except OSError as error:
            raise QemuGone(f"QEMU closed the qtest socket: {error.strerror}") from error
        self._unanswered += 1
        if self._unanswered >= _READ_ANSWERS_AT:
            self._read_answers()

    def _read_answers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                raise
            except OSError as error:
                raise QemuGone(f"QEMU closed the qtest socket: {error.strerror}") from error
            if not data:
                raise QemuGone("QEMU closed the qtest socket")
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for answer in lines:
                if answer.startswith(b"OK"):
                    self._unanswered -= 1
                elif not answer.startswith(b"IRQ"):
                    raise QemuError(f"QEMU refused a qtest command: {answer.decode('ascii', 'replace')}")


class LocalApics:
    """:class:`~vmbus.ports.Interrupts`: MSIs to the guest's local APICs, through qtest."""

    def __init__(self, qtest: Qtest, apic_ids: Sequence[int], gone: Callable[[QemuGone], None]) -> None:
        """``gone``: called when QEMU has closed the socket; later requests have no effect."""
        self._qtest = qtest
        self._apic_ids = tuple(apic_ids)
        self._gone = gone

    def request(self, vp: int, vector: int, *, auto_eoi: bool = False) -> None:
        # The gateway ends auto-EOI interrupts by itself: see Host._Events.auto_eoi_changed.
        try:
            self._qtest.interrupt(self._apic_ids[vp], vector)
        except QemuGone as error:  # the caller, a device at work, cannot handle that
            self._gone(error)
