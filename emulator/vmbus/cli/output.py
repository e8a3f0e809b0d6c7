"""All output of the command line: the only module of it that writes to standard output and standard error.

Guests, servers and peers choose much of what is shown: the console, messages of crashes, reasons of refusals, names.
A terminal executes what they send (it changes its title, its contents, with OSC 52 the clipboard), so what it may not
execute is shown instead: :func:`harmless`. What a guest's command prints reaches a file or a pipe byte by byte, and
only a terminal in this form.

A standard output that cannot be written raises :class:`OutputFailed`; ``main`` ends the command with it.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
from typing import BinaryIO, TextIO

from vmbus.errors import UserError

ERASE_LINE = "\r\x1b[K"
"""What :func:`note` begins with to replace its last text."""


class OutputFailed(UserError):
    """A standard output that does not take any more."""


class OutputClosed(OutputFailed):
    """A standard output whose reader has ended, as in ``| head -1``: nobody wants to hear of it."""


def harmless(text: str, keep: str = "\n\t") -> str:
    r"""Return ``text`` with ``\x1b`` and the like in place of what a terminal would execute; ``keep`` stays.

    Replaced are control characters of ASCII and Unicode, those that change the direction of text, and lone
    surrogates.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def one_line(text: str) -> str:
    r"""As :func:`harmless`, for text that could pretend to be more lines: a newline is shown as ``\n``."""
    return harmless(text, keep="")


def indented(text: str) -> str:
    """As :func:`harmless`; lines after the first are indented, so that none of them looks like a message itself."""
    return harmless(text).rstrip("\n").replace("\n", "\n  ")


# --- standard output ---


def show(text: str) -> None:
    """Print lines for a person."""
    _write(harmless(text) + "\n")


def show_exactly(text: str) -> None:
    """Print lines for programs (options, a configuration file): unchanged, unless they go to a terminal."""
    _write((harmless(text) if is_terminal(sys.stdout) else text) + "\n")


def show_json(value: object, indent: int | None = None) -> None:
    """Print ``value`` as JSON in ASCII."""
    _write(json.dumps(value, indent=indent).replace("\x7f", "\\u007f") + "\n")


def redraw(lines: int) -> None:
    """Erase the last ``lines`` lines of a terminal, to print them anew."""
    _write(f"\x1b[{lines}F\x1b[J")


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        raise _failed(error) from error


def _failed(error: OSError | ValueError) -> OutputFailed:
    """Return the error to raise; what standard output still holds is dropped, so that it fails no second time."""
    if isinstance(error, UnicodeError):
        return OutputFailed(f"cannot write the output: {error}; set LANG to a locale with UTF-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    if isinstance(error, BrokenPipeError):
        return OutputClosed("the output was closed")
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return OutputFailed(f"cannot write the output: {why}; write it to another file")


class Echo:
    """Passes the output of a guest's command to standard output; bytes for a file, text for a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._decoder = (
            codecs.getincrementaldecoder("utf-8")("backslashreplace") if is_terminal(self._stream) else None
        )

    def write(self, data: bytes, *, final: bool = False) -> None:
        """Pass on ``data``; ``final``: no more will come. Raises :class:`OutputFailed`."""
        if self._decoder is not None:
            # A carriage return and a backspace stay in the line that the command writes.
            text = harmless(self._decoder.decode(data, final), keep="\n\t\r\b")
            data = text.encode(self._stream.encoding, "backslashreplace")
        raw: BinaryIO = self._stream.buffer
        try:
            raw.write(data)
            raw.flush()
        except (OSError, ValueError) as error:
            raise _failed(error) from error


# --- standard error ---


def tell(text: str) -> None:
    """Print a message for the user on standard error."""
    note(harmless(text) + "\n")


def complain(verb: str, error: object) -> None:
    """Print what a verb failed with on standard error."""
    tell(f"vmbus {verb}: {indented(str(error))}".rstrip())


def note(text: str) -> None:
    """Write ``text``, which is harmless already, to standard error."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # there is no other place to report that


def is_terminal(stream: TextIO) -> bool:
    """Return whether ``stream`` is a terminal; a closed one is none."""
    try:
        return stream.isatty()
    except ValueError:
        return False


# --- the streams themselves ---


def open_streams() -> None:
    """Make usable streams of what the process was started with.

    A standard descriptor that is closed (``>&-``) would be given to the next file or socket that is opened, and
    written to by whoever means the terminal. A closed standard output fails when it is used, as a full one does.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            opened = os.open(os.devnull, flags)  # the lowest number that is free: this one
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def finish() -> None:
    """Write out what standard output still holds. Raises :class:`OutputFailed`."""
    _write("")
