"""What the embedded guest's second serial port carries: one command's output and its exit status.

    DLE STX "vmbus-start" LF     the command begins
    ...                          its output, any bytes at all
    DLE ETX "vmbus-exit N" LF    it ended with status N; nothing follows, the guest powers off

The last record is known by being last: the same bytes in the middle of the output are output. So up to
:data:`TRAILER_SIZE` bytes that might be the trailer are held back until more bytes come, or the end.
"""

from __future__ import annotations

import re

START = b"\x10\x02vmbus-start\n"
_TRAILER_HEAD = b"\x10\x03vmbus-exit "
_TRAILER = re.compile(re.escape(_TRAILER_HEAD) + rb"(\d{1,3})\n\Z")
TRAILER_SIZE = len(_TRAILER_HEAD) + 4


class CommandOutput:
    """Takes the port's bytes as they come.

    state      next           when
    waiting    running        the start record came; what was before it is dropped
    running    ended          the port was closed right after the trailer: ``status`` is set
    running    cut short      the port was closed without a trailer: ``status`` stays None
    """

    def __init__(self) -> None:
        self.started = False
        self.status: int | None = None
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """More bytes from the port; the part of them that is certainly the command's output."""
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
        """The bytes so far end in a trailer: unless more come, the command has ended."""
        return self.started and _TRAILER.search(self._pending) is not None

    def close(self) -> bytes:
        """The port is closed: the rest of the output. ``status`` is set if the command ended."""
        rest, self._pending = self._pending if self.started else b"", b""
        if match := _TRAILER.search(rest):
            self.status = int(match[1])
            rest = rest[: match.start()]
        return rest

    def _possible_trailer(self) -> int:
        """Where the bytes that may become the trailer begin."""
        at = max(len(self._pending) - TRAILER_SIZE, 0)
        while (at := self._pending.find(b"\x10", at)) >= 0:
            tail = self._pending[at:]
            if _TRAILER_HEAD.startswith(tail) or re.fullmatch(
                re.escape(_TRAILER_HEAD) + rb"\d{0,3}\n?", tail
            ):
                return at
            at += 1
        return len(self._pending)
