"""What a process says of the QEMU that it serves, and how: the facts and options, as names and plain values.

The other process may be of another release: what it does not know is left out, and what it does not find has its
default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from vmbus.hypervisor.features import Features
from vmbus.machine.host import HostOptions
from vmbus.machine.memory import RamRegion
from vmbus.machine.migration.state_machine import Switchover
from vmbus.machine.qemu.discovery import QemuFacts
from vmbus.machine.qemu.memory_devices import MemoryDevice
from vmbus.machine.reload.link import ReloadFailed
from vmbus.wire.cpuid import HostVersion
from vmbus.wire.version import Version

_T = TypeVar("_T")


def facts_values(facts: QemuFacts) -> dict[str, Any]:
    """Return ``facts`` as names and plain values."""
    return {**dataclasses.asdict(facts), "ram_path": str(facts.ram_path)}


def read_facts(values: Mapping[str, Any], *, running: bool) -> QemuFacts:
    """Return the facts that :func:`facts_values` gave; ``running``: whether the guest runs now.

    Raises :class:`~vmbus.machine.reload.link.ReloadFailed`.
    """
    try:
        return _make(
            QemuFacts,
            values,
            running=running,
            ram_path=Path(values["ram_path"]),
            ram_regions=tuple(_make(RamRegion, each) for each in values["ram_regions"]),
            apic_ids=tuple(int(each) for each in values["apic_ids"]),
            memory_devices=tuple(_make(MemoryDevice, each) for each in values.get("memory_devices", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReloadFailed(f"the description of QEMU cannot be read: {error!r}") from error


def options_values(options: HostOptions) -> dict[str, Any]:
    """Return ``options`` as names and plain values."""
    return {
        **dataclasses.asdict(options),
        "max_version": int(options.max_version),
        "switchover": options.switchover.value,
    }


def read_options(values: Mapping[str, Any]) -> HostOptions:
    """Return the options that :func:`options_values` gave.

    Raises :class:`~vmbus.machine.reload.link.ReloadFailed`.
    """
    try:
        features = dict(values["features"])
        return _make(
            HostOptions,
            values,
            features=_make(Features, features, host_version=_make(HostVersion, features["host_version"])),
            max_version=Version(values["max_version"]),
            switchover=Switchover(values["switchover"]),
            takeover=False,
            reset=False,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReloadFailed(f"the options of the host cannot be read: {error!r}") from error


def _make(cls: type[_T], values: Mapping[str, Any], **converted: Any) -> _T:
    """Return an object of a dataclass from those of ``values`` that it has, and from ``converted``."""
    known = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{**{name: value for name, value in values.items() if name in known}, **converted})
