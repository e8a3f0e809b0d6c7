"""Devices that several ``--device`` lines describe, each line a part.

Some options belong to the whole device: given on one line, they hold for all of its lines (:func:`completed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from vmbus.bus.io.device import Device
from vmbus.devices.line import join_device, split_device
from vmbus.devices.options import options_of
from vmbus.errors import UsageError


@runtime_checkable
class Joinable(Protocol):
    """A device that several ``--device`` lines describe; its class may have a :class:`Whole` called ``whole``."""

    def join(self, other: Device) -> bool:
        """Take over the part that ``other``, made from a later line, stands for.

        Return False if ``other`` is a device of its own.

        Raises :class:`~vmbus.errors.UsageError` when the two contradict each other.
        """


@dataclass(frozen=True, slots=True)
class Whole:
    """Declares that lines with the same value of option ``key`` are one device, to which ``options`` belong."""

    key: str
    options: tuple[str, ...]


@dataclass(slots=True)
class _Given:
    """What the lines of one device say about the whole device: the value of each option, and its text."""

    values: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def completed(
    texts: Iterable[str], class_of: Callable[[str], type[Device]], there: Sequence[str] = ()
) -> list[str]:
    """Return ``texts``, each with the options of the whole that another line of its device gives.

    ``there``: lines of existing devices, which are considered but not returned. Raises
    :class:`~vmbus.errors.UsageError` where two lines contradict each other.
    """
    found: dict[tuple[str, str], _Given] = {}
    for text in there:
        _collect(text, class_of, found)
    found_lines = [(text, _collect(text, class_of, found)) for text in texts]
    return [_complete(text, given) for text, given in found_lines]


def _collect(
    text: str, class_of: Callable[[str], type[Device]], found: dict[tuple[str, str], _Given]
) -> _Given | None:
    name, values = split_device(text)
    cls = class_of(name)
    whole: Whole | None = getattr(cls, "whole", None)
    if whole is None:
        return None
    options = {option.key: option for option in options_of(cls)}
    which = values.get(whole.key, str(options[whole.key].default))
    given = found.setdefault((name, which), _Given())
    for key in whole.options:
        if key not in values:
            continue
        try:
            value = options[key].read(values[key])
        except UsageError as error:
            raise UsageError(f"--device {text}: {error}") from error
        if given.values.setdefault(key, value) != value:
            raise UsageError(
                f"--device {text}: {key}={values[key]}, but {whole.key} {which} has {key}={given.texts[key]}; "
                "it holds for all lines that name it, so give it once"
            )
        given.texts.setdefault(key, values[key])
    return given


def _complete(text: str, given: _Given | None) -> str:
    if given is None:
        return text
    name, values = split_device(text)
    missing = {key: value for key, value in given.texts.items() if key not in values}
    return join_device(name, values | missing) if missing else text
