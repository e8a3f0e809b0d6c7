"""What a user can set on a device: the annotated keyword parameters of its ``__init__``.

    class Heartbeat(IntegrationComponent):
        def __init__(self, *, interval: Annotated[float, Help("seconds between two beats")] = 2.0) -> None:

makes ``--device heartbeat,interval=0.5``. A parameter without :class:`Help` is not an option. The
type says how the text is read: ``str``, ``int`` (also ``0x20``), ``float``, ``bool`` (``on`` or ``off``),
``uuid.UUID``, ``pathlib.Path``, an ``enum.Enum`` (by value), any of them ``| None``.
"""

from __future__ import annotations

import enum
import inspect
import math
import re
import types
import typing
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbus.errors import DeviceError, UsageError

_SIZE = re.compile(r"(\d{1,19})([KMGT]?)", re.IGNORECASE | re.ASCII)
_MAX_SIZE = (1 << 63) - 1  # of a file
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_FILE = "file"
_URI = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Help:
    """One line for the user, with the unit; for numbers, also the least and the greatest value that are allowed.

    ``file``: the text names a file, unless it is a URI. ``files``: it names some, separated by semicolons; ``on`` and
    ``off`` are no names. An option of type ``pathlib.Path`` needs neither.
    """

    text: str
    least: float = -math.inf
    most: float = math.inf
    file: bool = False
    files: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """One key of ``--device``. ``kind`` describes a value in a word: ``integer``, ``on|off``, ``GUID``."""

    key: str
    kind: str
    help: Help
    default: Any
    parse: Callable[[str], Any]
    required: bool = False

    def read(self, text: str) -> Any:
        """Return the value that ``text`` stands for. Raises :class:`~vmbus.errors.UsageError`."""
        try:
            value = self.parse(text)
        except ValueError as error:
            raise UsageError(f"{self.key}={text}: expected {self.kind}") from error
        if isinstance(value, (int, float)) and not self.help.least <= value <= self.help.most:
            raise UsageError(f"{self.key}={text}: expected {self.kind}{self._bounds()}")
        return value

    def absolute(self, text: str, folder: Path) -> str:
        """Return ``text`` with the file names in it made absolute, as seen from ``folder``."""
        if self.help.files:
            names = text.split(";")
            return ";".join(name if name in ("on", "off") else _absolute(name, folder) for name in names)
        return _absolute(text, folder) if self.help.file or self.kind == _FILE else text

    def describe(self) -> str:
        """Return one line for a list of options."""
        if isinstance(self.default, bool):
            default = "on" if self.default else "off"
        else:
            default = str(self.default.value if isinstance(self.default, enum.Enum) else self.default)
        shown = (
            " (required)" if self.required else "" if self.default in (None, "") else f" (default {default})"
        )
        return f"{self.key}=<{self.kind}>  {self.help.text}{shown}"

    def _bounds(self) -> str:
        least, most = self.help.least, self.help.most
        if math.isinf(least) and math.isinf(most):
            return ""
        if math.isinf(most):
            return f" of at least {least:g}"
        return f" of at most {most:g}" if math.isinf(least) else f" from {least:g} to {most:g}"


def options_of(device: type) -> tuple[Option, ...]:
    """Return the options of a device class, in the order of its parameters.

    Raises :class:`~vmbus.errors.DeviceError` for a parameter whose type no text can be read as.
    """
    hints = typing.get_type_hints(inspect.getattr_static(device, "__init__"), include_extras=True)
    found = []
    for name, parameter in inspect.signature(device).parameters.items():
        hint = hints.get(name)
        helps = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Help)]
        if not helps:
            continue
        kind, parse = _reader(typing.get_args(hint)[0], f"{device.__name__}({name})")
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        found.append(Option(name, kind, helps[0], default, parse, required))
    return tuple(found)


def _reader(wanted: Any, where: str) -> tuple[str, Callable[[str], Any]]:
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        kinds = [each for each in typing.get_args(wanted) if each is not type(None)]
        if len(kinds) == 1:
            wanted = kinds[0]
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        values = {str(each.value): each for each in wanted}
        return "|".join(values), lambda text: _pick(values, text)
    simple: dict[Any, tuple[str, Callable[[str], Any]]] = {
        str: ("text", str),
        bool: ("on|off", lambda text: _pick({"on": True, "off": False}, text)),
        int: ("integer", lambda text: int(text, 0)),
        float: ("number", _finite),
        uuid.UUID: ("GUID", uuid.UUID),
        Path: (_FILE, Path),
    }
    if wanted not in simple:
        raise DeviceError(
            f"{where}: no option can be of type {wanted}; possible are str, int, float, bool, UUID, Path and enums"
        )
    return simple[wanted]


def _absolute(name: str, folder: Path) -> str:
    return name if not name or _URI.match(name) else str(folder / name)


def _pick(values: dict[str, Any], text: str) -> Any:
    if text not in values:
        raise ValueError(text)
    return values[text]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def parse_size(text: str) -> int:
    """Return the bytes that ``20G`` stands for; a bare number is bytes. Raises :class:`~vmbus.errors.UsageError`."""
    found = _SIZE.fullmatch(text)
    value = int(found[1]) * _UNITS[found[2].upper()] if found is not None else 0
    if not 0 < value <= _MAX_SIZE:
        raise UsageError(
            f"{text!r} is not a size: write a number of bytes, or one with K, M, G or T, as in 20G"
        )
    return value
