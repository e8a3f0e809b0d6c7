"""The embedded guest's second serial port, which carries one command's output and its exit status.

    DLE STX "vmbus-start" LF     the command begins
    ...                          its output, any bytes at all
    DLE ETX "vmbus-exit N" LF    it ended with status N; nothing follows, the guest powers off

Only the last record is the trailer; the same bytes in the middle of the output are output. So up to
:data:`TRAILER_SIZE` bytes that may be the trailer are kept back until more bytes arrive or the port is closed.
"""

from __future__ import annotations

import re

START = b"\x10\x02vmbus-start\n"
_TRAILER_HEAD = b"\x10\x03vmbus-exit "
_TRAILER = re.compile(re.escape(_TRAILER_HEAD) + rb"(\d{1,3})\n\Z")
TRAILER_SIZE = len(_TRAILER_HEAD) + 4


class CommandOutput:
    """Separates output and exit status in the port's bytes.

    state      next           when
    waiting    running        the start record arrived; bytes before it are dropped
    running    ended          the port was closed right after the trailer: ``status`` is set
    running    cut short      the port was closed without a trailer: ``status`` stays None
    """

    def __init__(self) -> None:
        self.started = False
        self.status: int | None = None
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """Take more bytes from the port; return those that are certainly the command's output."""
        self._pending += data
        if not self.started:
            _, found, rest = self._pending.partition(START)
            if not found:
                self._pending = self._pending[-(len(START) - 1) :]
                return b""
            self.started = True
            self._pending = rest
        keep = self._possible_trailer()
        output, self._pending = self._pending[:keep], self._pending[keep:]
        return output

    @property
    def trailer_seen(self) -> bool:
        """Whether the bytes so far end in a trailer: unless more arrive, the command has ended."""
        return self.started and _TRAILER.search(self._pending) is not None

    def close(self) -> bytes:
        """Take the end of the port; return the rest of the output. ``status`` is set if the command ended."""
        rest, self._pending = self._pending if self.started else b"", b""
        if match := _TRAILER.search(rest):
            self.status = int(match[1])
            rest = rest[: match.start()]
        return rest

    def _possible_trailer(self) -> int:
        """Return the offset of the bytes that may become the trailer."""
        at = max(len(self._pending) - TRAILER_SIZE, 0)
        while (at := self._pending.find(b"\x10", at)) >= 0:
            tail = self._pending[at:]
            if _TRAILER_HEAD.startswith(tail) or re.fullmatch(
                re.escape(_TRAILER_HEAD) + rb"\d{0,3}\n?", tail
            ):
                return at
            at += 1
        return len(self._pending)
