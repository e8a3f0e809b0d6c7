"""All output of the command line: the only module of it that writes to standard output and standard error.

Guests, servers and peers choose much of what is shown: the console, messages of crashes, reasons of refusals, names.
A terminal executes what they send (it changes its title, its contents, with OSC 52 the clipboard), so what it may not
execute is shown instead (:mod:`vmbus.printable`). What a guest's command prints reaches a file or a pipe byte by
byte, and only a terminal in this form.

A standard output that cannot be written raises :class:`OutputFailed`; ``main`` ends the command with it.

A command that serves a guest never waits for the reader of its output (:func:`serving`): a thread writes. The output
of the guest's command is complete, because the command waits instead; of messages those are left out that are too
many to be kept.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import BinaryIO, TextIO

from vmbus.cli.writer import Writer
from vmbus.errors import UserError
from vmbus.printable import harmless, indented

ERASE_LINE = "\r\x1b[K"
"""What :func:`note` begins with to replace its last text."""


MAX_WAITING = 1 << 20
"""Bytes of output that wait for their reader."""
FLUSH_TIMEOUT = 2.0
"""Seconds for a reader to take the rest, where nobody waits for it: messages, and the output of what was ended."""

_writers: dict[int, Writer] | None = None
"""The writers by their descriptors, while a guest is served."""
_owed = False
"""Whether the rest of standard output is worth to wait for its reader."""


class OutputFailed(UserError):
    """A standard output that does not take any more."""


class OutputClosed(OutputFailed):
    """A standard output whose reader has ended, as in ``| head -1``: nobody wants to hear of it."""


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


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Write without waiting for readers in this block; at its end wait until the rest is written.

    That wait is short, unless :meth:`Echo.owe` was called. Raises :class:`OutputFailed`.
    """
    global _owed, _writers
    _owed = False  # of a command before this one
    writers = _writers = {}
    try:
        yield
    except BaseException:
        _flush(writers, FLUSH_TIMEOUT)
        raise
    else:
        _flush(writers, None if _owed else FLUSH_TIMEOUT)
    finally:
        _writers = None
    if 1 in writers and (error := writers[1].error) is not None:
        raise _failed(error) from error


def _flush(writers: Mapping[int, Writer], timeout: float | None) -> None:
    """``timeout``: seconds for standard output; ``None``: as long as it has a reader."""
    for number, writer in list(writers.items()):
        writer.flush(timeout if number == 1 else FLUSH_TIMEOUT)


def _writer(stream: TextIO | BinaryIO) -> Writer | None:
    """Return who writes to ``stream`` now; ``None``: write to it directly, as to a file, which has no reader."""
    if _writers is None:
        return None
    try:
        number = stream.fileno()
        direct = stat.S_ISREG(os.fstat(number).st_mode)
    except (AttributeError, OSError, ValueError):  # closed, or none of the system's
        return None
    if direct:
        return None
    return _writers.setdefault(number, Writer(number, MAX_WAITING))


def _write(text: str) -> None:
    if (writer := _writer(sys.stdout)) is not None:
        if writer.error is not None:
            raise _failed(writer.error) from writer.error
        writer.offer(text.encode(sys.stdout.encoding, "backslashreplace"))
        return
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
        if (writer := _writer(raw)) is not None:
            writer.put(data)
            if writer.error is not None:
                raise _failed(writer.error) from writer.error
            return
        try:
            raw.write(data)
            raw.flush()
        except (OSError, ValueError) as error:
            raise _failed(error) from error

    async def room(self) -> None:
        """Wait until the reader has taken enough that more can be written. Raises :class:`OutputFailed`."""
        if (writer := _writer(self._stream.buffer)) is not None:
            await writer.room()
            if writer.error is not None:
                raise _failed(writer.error) from writer.error

    def owe(self) -> None:
        """Let :func:`serving` wait until the reader has all: the guest's command has ended by itself."""
        global _owed
        _owed = True

    def lift_limit(self) -> None:
        """Let :meth:`room` wait no more: the guest has ended, and little is left to write."""
        if (writer := _writer(self._stream.buffer)) is not None:
            writer.lift_limit()


# --- standard error ---


def tell(text: str) -> None:
    """Print a message for the user on standard error."""
    note(harmless(text) + "\n")


def complain(verb: str, error: object) -> None:
    """Print what a verb failed with on standard error."""
    tell(f"vmbus {verb}: {indented(str(error))}".rstrip())


def note(text: str) -> None:
    """Write ``text``, which is harmless already, to standard error."""
    if (writer := _writer(sys.stderr)) is not None:
        writer.offer(text.encode(sys.stderr.encoding, "backslashreplace"))
        return
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
