"""Log files that keep the beginning and the end: what a guest makes QEMU print cannot fill the host's file systems.

A guest prints to its console as fast as it likes, and the console's file is in a memory file system. So QEMU does not
write such a file itself; it writes to a pipe or socket, and a thread of this process copies that into a
:class:`BoundedLog`. A thread, because QEMU must not wait for the event loop, which waits for QEMU at times.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path

_logger = logging.getLogger(__name__)

_READ_SIZE = 1 << 16


class BoundedLog:
    """A file with the first ``keep`` bytes of all that was written, and at least as many of the last.

    Between them is a line that says how much was left out. The file has at most ``3 * keep`` bytes.
    """

    def __init__(self, path: Path, keep: int) -> None:
        """Create the file, or empty it. Raises ``OSError``."""
        self.path = path
        self._keep = keep
        self._size = 0
        self._written = 0
        self._failed = False
        self._lock = threading.Lock()  # a guest that moves has two QEMUs for a moment
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> None:
        """Append ``data``; where that is not possible (the file system is full), it is lost, and that is logged."""
        with self._lock:
            if self._file is None:
                return
            try:
                while data:
                    if self._size == 3 * self._keep:
                        self._leave_out(self._file)
                    done = os.pwrite(self._file, data[: 3 * self._keep - self._size], self._size)
                    self._size += done
                    self._written += done
                    data = data[done:]
            except OSError as error:
                if not self._failed:
                    self._failed = True
                    _logger.warning(
                        "cannot write %s: %s; a part of it will be missing", self.path, error.strerror
                    )

    def _leave_out(self, file: int) -> None:
        """Move the end to behind the beginning."""
        end = os.pread(file, self._keep, self._size - self._keep)
        middle = self._written - self._keep - len(end)
        rest = b"\n[vmbus: %d bytes are left out here]\n" % middle + end
        self._size = self._keep + os.pwrite(file, rest, self._keep)
        os.ftruncate(file, self._size)

    def close(self) -> None:
        """Close the file; what is written afterwards is lost."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


class BoundedText:
    """The first ``keep`` bytes of all that was written, and the last ``keep`` bytes, in memory."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._begin = b""
        self._end = b""
        self._left_out = 0
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Append ``data``."""
        with self._lock:
            room = self._keep - len(self._begin)
            self._begin += data[:room]
            rest = self._end + data[room:]
            cut = max(len(rest) - self._keep, 0)
            self._left_out += cut
            self._end = rest[cut:]

    def text(self) -> str:
        """Return what is kept; between the two parts is how much was left out."""
        with self._lock:
            middle = b"\n[%d bytes are left out here]\n" % self._left_out if self._left_out else b""
            return (self._begin + middle + self._end).decode(errors="replace")

    def close(self) -> None:
        """Do nothing: there is no file."""


class LogCopy:
    """Copies what a pipe or socket gives into ``log``, until its other side is closed; closes ``descriptor`` then."""

    def __init__(self, descriptor: int, log: BoundedLog | BoundedText, *, close_log: bool) -> None:
        self._descriptor = descriptor
        self._log = log
        self._close_log = close_log
        self._thread = threading.Thread(target=self._copy, name="copy to a log", daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with contextlib.suppress(OSError):  # a reset connection: the end, too
            while data := os.read(self._descriptor, _READ_SIZE):
                self._log.write(data)
        os.close(self._descriptor)
        if self._close_log:
            self._log.close()

    def wait(self, timeout: float = 2.0) -> bool:
        """Wait until all is copied, at most ``timeout`` seconds; return whether it is."""
        self._thread.join(timeout)
        return not self._thread.is_alive()


def copy_socket(path: Path, log: BoundedLog) -> LogCopy:
    """Connect to the Unix socket ``path`` and copy what comes into ``log``. Raises ``OSError``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.connect(str(path))
        return LogCopy(connection.detach(), log, close_log=False)
