"""Progress of long steps, shown on a terminal only."""

from __future__ import annotations

import sys
from typing import Protocol, TextIO


class Progress(Protocol):
    """Receives the progress of long steps. ``total`` 0 means: unknown."""

    def step(self, text: str) -> None:
        """Begin a new step."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """Report ``done`` of ``total`` ``unit`` of the present step ("B" is bytes, anything else is counted)."""

    def finish(self) -> None:
        """End the present step and leave the terminal tidy."""


class Silent:
    """A :class:`Progress` that shows nothing."""

    def step(self, text: str) -> None:
        pass

    def advance(self, done: int, total: int, unit: str) -> None:
        pass

    def finish(self) -> None:
        pass


class Terminal:
    """A :class:`Progress` with one line for each step, rewritten in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._shown = ""

    def step(self, text: str) -> None:
        self.finish()
        self._text = text
        self._show(f"{text} ...")

    def advance(self, done: int, total: int, unit: str) -> None:
        def amount(n: int) -> str:
            return f"{n / 1e6:.1f} MB" if unit == "B" else str(n)

        of = f"{amount(done)} of {amount(total)}" if total else amount(done)
        percent = f" ({100 * done // total} %)" if total else ""
        self._show(f"{self._text}: {of}{'' if unit == 'B' else ' ' + unit}{percent}")

    def finish(self) -> None:
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
        self._shown = ""

    def _show(self, line: str) -> None:
        if line != self._shown:
            self._stream.write("\r" + line.ljust(len(self._shown)))
            self._stream.flush()
            self._shown = line


def for_stream(stream: TextIO | None = None) -> Progress:
    """Return a :class:`Terminal` if ``stream`` (standard error by default) is one, else :class:`Silent`."""
    stream = sys.stderr if stream is None else stream
    return Terminal(stream) if stream.isatty() else Silent()
