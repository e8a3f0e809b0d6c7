"""The installed devices, and ``--device NAME,key=value,...``.

A device is found by an entry point of the group ``vmbus.devices``, so a third party's package adds one by being
installed. Every device has the option ``id=``, its name, which is needed for two of a kind.

Mistakes in the text raise :class:`~vmbus.errors.UsageError`, which says what is allowed; a broken package raises
:class:`~vmbus.errors.DeviceError`.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from vmbus.bus.io.device import Device
from vmbus.devices.joined import Joinable, completed
from vmbus.devices.line import join_device, split_device
from vmbus.devices.options import Option, options_of
from vmbus.errors import DeviceError, UsageError
from vmbus.native import NativeLibrary

_logger = logging.getLogger(__name__)

GROUP = "vmbus.devices"

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")


class Registry:
    """The devices of all installed packages, or for tests those of the entry points ``found``."""

    def __init__(
        self, found: Iterable[EntryPoint] | None = None, *, services: Mapping[str, Any] | None = None
    ) -> None:
        """``services``: objects for every device whose ``__init__`` has a parameter of that name."""
        self._services = dict(services or {})
        self._entries: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=GROUP) if found is None else found:
            others = self._entries.setdefault(entry.name, [])
            if entry.value not in [other.value for other in others]:
                others.append(entry)

    @property
    def names(self) -> list[str]:
        """The names that ``--device`` accepts, sorted."""
        return sorted(self._entries)

    def load(self, name: str) -> type[Device]:
        """Return the class behind ``name``."""
        entries = self._entries.get(name)
        if entries is None:
            close = difflib.get_close_matches(name, self.names, 1)
            guess = f" Did you mean {close[0]}?" if close else ""
            known = ", ".join(self.names) or "none (is the package installed?)"
            raise UsageError(f"there is no device {name!r}.{guess} There are: {known}")
        if len(entries) > 1:
            values = ", ".join(entry.value for entry in entries)
            raise DeviceError(f"several packages have a device {name!r}: {values}; uninstall all but one")
        try:
            found = entries[0].load()
        except Exception as error:
            raise DeviceError(f"device {name!r} ({entries[0].value}) does not load: {error!r}") from error
        if not (isinstance(found, type) and issubclass(found, Device)):
            raise DeviceError(f"device {name!r} ({entries[0].value}) is not a class derived from Device")
        return found

    def create(self, text: str) -> Device:
        """Return a new device, not started, from the text after ``--device``."""
        name, values = split_device(text)
        cls = self.load(name)
        own_name = values.pop("id", None)
        if own_name is not None and not _ID.fullmatch(own_name):
            raise UsageError(
                f"--device {text}: id={own_name}: expected a letter, then letters, digits, '.', '_' or '-'"
            )
        options = {option.key: option for option in options_of(cls)}
        arguments: dict[str, Any] = {}
        for key, value in values.items():
            if key not in options:
                close = difflib.get_close_matches(key, ("id", *options), 1)
                guess = f" Did you mean {close[0]}=?" if close else ""
                raise UsageError(
                    f"--device {text}: {name} has no option {key!r}.{guess}\n{_listing(name, options)}"
                )
            try:
                arguments[key] = options[key].read(value)
            except UsageError as error:
                raise UsageError(f"--device {text}: {error}") from error
        missing = [key for key, option in options.items() if option.required and key not in arguments]
        if missing:
            raise UsageError(f"--device {text}: {missing[0]}= is missing.\n{_listing(name, options)}")
        parameters = inspect.signature(cls).parameters
        arguments |= {key: each for key, each in self._services.items() if key in parameters}
        try:
            device = cls(**arguments)
        except UsageError as error:
            raise UsageError(f"--device {text}: {error}") from error
        except TypeError as error:
            raise DeviceError(f"device {name!r} cannot be created: {error}") from error
        if own_name is not None:
            device.name = own_name
        device.line = text
        return device

    def seen_from(self, folder: Path, text: str) -> str:
        """Return a device's text with its file names made absolute, for a process in another folder."""
        name, values = split_device(text)
        for option in options_of(self.load(name)):
            if option.key in values:
                values[option.key] = option.absolute(values[option.key], folder)
        return join_device(name, values)

    def completed(self, texts: Iterable[str], there: Sequence[str] = ()) -> list[str]:
        """Return ``texts`` with the options that other lines of their devices give.

        See :func:`~vmbus.devices.joined.completed`.
        """
        return completed(texts, self.load, there)

    def create_all(self, texts: Iterable[str]) -> list[Device]:
        """Return a device from each text, or one from several texts that describe its parts (:class:`Joinable`)."""
        devices: list[Device] = []
        try:
            for text in self.completed(texts):
                device = self.create(text)
                try:
                    joined = any(isinstance(each, Joinable) and each.join(device) for each in devices)
                except UsageError as error:
                    device.stop()
                    raise UsageError(f"--device {text}: {error}") from error
                if not joined:
                    devices.append(device)
                    _check_unique(devices)
        except BaseException:
            for device in devices:
                device.stop()
            raise
        return devices

    def native_libraries(self) -> list[NativeLibrary]:
        """Return what the devices have compiled, each library once; a device that does not load is left out."""
        found: list[NativeLibrary] = []
        for name in self.names:
            try:
                libraries = self.load(name).native_libraries
            except DeviceError as error:
                _logger.warning("%s", error)
                continue
            found += [each for each in libraries if each not in found]
        return found

    def help(self, name: str | None = None) -> str:
        """Return the text for ``--device help``, or with ``name`` for ``--device NAME,help``."""
        if name is not None:
            return _listing(name, {option.key: option for option in options_of(self.load(name))})
        lines = []
        for each in self.names:
            try:
                about = (self.load(each).__doc__ or "").strip().partition("\n")[0]
            except DeviceError as error:
                about = f"(broken: {error})"
            lines.append(f"{each:<12} {about}".rstrip())
        return "\n".join(lines)


def _check_unique(devices: Sequence[Device]) -> None:
    """Raise :class:`~vmbus.errors.UsageError` if the guest could not tell the last of ``devices`` from another."""
    *others, last = devices
    instance = last.offer().instance_id
    for each in others:
        if each.offer().instance_id == instance:
            raise UsageError(
                f"--device {last.line}: {each.name} has this instance GUID already; give each device a GUID of its "
                "own (instance=), and a name (id=)"
            )


def _listing(name: str, options: dict[str, Option]) -> str:
    lines = [f"Options of {name}:", "  id=<text>  the name of this device, for two of a kind"]
    return "\n".join(lines + [f"  {option.describe()}" for option in options.values()])
