"""Progress of long steps, shown on a terminal only; what mirrors and packages are called passes the filter."""

from __future__ import annotations

import contextlib
import sys
from typing import Protocol, TextIO

from vmbus.printable import one_line


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
            _print("\n", self._stream)
        self._shown = ""

    def _show(self, line: str) -> None:
        line = one_line(line)
        if line != self._shown:
            _print("\r" + line.ljust(len(self._shown)), self._stream)
            self._shown = line


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line on ``stream`` (standard error by default)."""
    _print(one_line(text) + "\n", sys.stderr if stream is None else stream)


def _print(text: str, stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone ends no download
        stream.write(text)
        stream.flush()


def for_stream(stream: TextIO | None = None) -> Progress:
    """Return a :class:`Terminal` if ``stream`` (standard error by default) is one, else :class:`Silent`."""
    stream = sys.stderr if stream is None else stream
    return Terminal(stream) if stream.isatty() else Silent()
