"""``vmbus doctor``: what this machine has, what is missing, and how to get it.

The checks change nothing and take well under a second each.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from vmbus.errors import UserError
from vmbus.provision import cache, firmware, kernel, qemu, system_disk, system_packages

PYTHON_PACKAGES = {
    "construct": "construct",
    "elftools": "pyelftools",
    "qemu.qmp": "qemu.qmp",
    "dbus_fast": "dbus-fast",
    "zstandard": "zstandard",
}
_NEEDED_DISK = 1 << 30
_NEEDED_MEMORY = 1 << 30
_NEEDED_SHM = 512 << 20


class State(StrEnum):
    """The result of a check. Only ``MISSING`` keeps the emulator from working."""

    OK = "ok"
    MISSING = "missing"
    OPTIONAL = "optional"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: what was looked for, what was found, and how to get it if it is missing."""

    name: str
    state: State
    found: str
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        return {**asdict(self), "state": self.state.value}


def examine(folder: Path | None = None, more: Sequence[Check] = ()) -> list[Check]:
    """Return all checks of this machine; ``more`` are checks of the caller (the gateway), put after QEMU's."""
    folder = folder or cache.cache_folder()
    return [
        Check("Python", State.OK, platform.python_version()),
        _python_packages(),
        *_qemu(folder),
        *more,
        *_packages(),
        *(_kernel(name, folder) for name in kernel.GUESTS),
        _busybox(folder),
        _firmware(folder),
        _system(folder),
        _disk(folder),
        _memory(),
        _shared_memory(),
    ]


def healthy(checks: Sequence[Check]) -> bool:
    """Return whether nothing necessary is missing."""
    return all(check.state is not State.MISSING for check in checks)


def _python_packages() -> Check:
    missing = [package for module, package in PYTHON_PACKAGES.items() if not _importable(module)]
    if missing:
        return Check(
            "Python packages",
            State.MISSING,
            f"without {', '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )
    return Check("Python packages", State.OK, ", ".join(PYTHON_PACKAGES.values()))


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _qemu(folder: Path) -> list[Check]:
    try:
        found = qemu.find_qemu(folder)
    except UserError as error:
        return [Check("QEMU", State.MISSING, str(error), "vmbus setup")]
    version = ".".join(map(str, found.version))
    checks = [Check("QEMU", State.OK, f"{version} ({found.origin}), TCG plug-ins, qtest")]
    if found.dbus_vmstate:
        checks.append(
            Check(
                "QEMU dbus-vmstate", State.OK, "carries the emulator's state in QEMU's own migration stream"
            )
        )
    else:
        checks.append(
            Check(
                "QEMU dbus-vmstate",
                State.OPTIONAL,
                "not in this QEMU: migrations use a side channel",
                "a QEMU built with D-Bus, or `vmbus setup` with VMBUS_QEMU unset",
            )
        )
    for name, why in (("qemu-img", "disk images"), ("dbus-daemon", "live migration through dbus-vmstate")):
        try:
            command = found.dbus_daemon() if name == "dbus-daemon" else found.tool(name)
            checks.append(Check(name, State.OK, command[-1]))
        except UserError as error:
            checks.append(Check(name, State.OPTIONAL, f"{error} ({why})", "vmbus setup"))
    return checks


def _packages() -> list[Check]:
    checks = []
    for package in (*system_packages.BUILD_PACKAGES, *system_packages.FETCH_PACKAGES):
        if package.there():
            checks.append(Check(package.name, State.OK, package.purpose))
        else:
            optional = package.name in ("make", "python3-venv") or package in system_packages.FETCH_PACKAGES
            state = State.OPTIONAL if optional else State.MISSING
            remedy = system_packages.install_line([package])
            checks.append(Check(package.name, state, f"not installed ({package.purpose})", remedy))
    return checks


def _kernel(name: str, folder: Path) -> Check:
    title = f"guest {name}"
    try:
        return Check(title, State.OK, f"Linux {kernel.find_kernel(name, folder).release}")
    except UserError:
        state = State.MISSING if name == kernel.DEFAULT_GUEST else State.OPTIONAL
        return Check(
            title,
            state,
            f"has not been fetched ({kernel.GUESTS[name].description})",
            f"vmbus setup --guest {name}",
        )


def _busybox(folder: Path) -> Check:
    try:
        return Check("guest userspace", State.OK, kernel.find_busybox(folder).name)
    except UserError:
        return Check("guest userspace", State.MISSING, "busybox has not been fetched", "vmbus setup")


def _firmware(folder: Path) -> Check:
    title = "UEFI firmware"
    try:
        return Check(title, State.OK, str(firmware.find_firmware(folder)))
    except UserError as error:
        return Check(title, State.OPTIONAL, str(error), "vmbus setup --firmware")


def _system(folder: Path) -> Check:
    title = "Debian system disk"
    try:
        return Check(title, State.OK, str(system_disk.find_system(folder)))
    except UserError:
        return Check(title, State.OPTIONAL, "not created", "vmbus setup --system")


def _disk(folder: Path) -> Check:
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    return _amount(
        "disk space",
        free,
        _NEEDED_DISK,
        str(folder),
        "free some space, or set VMBUS_CACHE to a folder on another disk",
    )


def _memory() -> Check:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _amount(
        "memory", free, _NEEDED_MEMORY, "available", "end other programs, or give guests less (--memory)"
    )


def _shared_memory() -> Check:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check(
            "/dev/shm", State.OPTIONAL, "does not exist", "guest memory is then kept in the run directory"
        )
    remedy = "mount it larger (in a container: --shm-size 2g), or give guests less (--memory)"
    return _amount("/dev/shm", shutil.disk_usage(place).free, _NEEDED_SHM, "free", remedy)


def _amount(name: str, free: int, needed: int, where: str, remedy: str) -> Check:
    text = f"{free / 1e9:.1f} GB ({where})"
    if free >= needed:
        return Check(name, State.OK, text)
    return Check(name, State.OPTIONAL, f"{text}; {needed / 1e9:.1f} GB are recommended", remedy)
