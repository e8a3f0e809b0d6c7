"""Packages of this machine's distribution that compiling and fetching need."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from vmbus.errors import MissingRequirement
from vmbus.provision.progress import say


@dataclass(frozen=True, slots=True)
class SystemPackage:
    """A Debian package, its purpose, and a test for what is needed of it."""

    name: str
    purpose: str
    there: Callable[[], bool]


def _program(*names: str) -> Callable[[], bool]:
    return lambda: any(shutil.which(name) for name in names)


def _file(*paths: str) -> Callable[[], bool]:
    return lambda: any(Path(path).exists() for path in paths)


def _can_make_environments() -> bool:
    """Return whether Python can make environments, or runs in one already."""
    return sys.prefix != sys.base_prefix or importlib.util.find_spec("ensurepip") is not None


BUILD_PACKAGES = (
    SystemPackage("gcc", "compiles the trap gateway", _program("cc", "gcc", "clang")),
    SystemPackage(
        "libc6-dev", "headers for the trap gateway", _file("/usr/include/stdlib.h", "/usr/include/features.h")
    ),
    SystemPackage("make", "runs the project's Makefile", _program("make")),
    SystemPackage("python3-venv", "makes the project's Python environment", _can_make_environments),
)
FETCH_PACKAGES = (
    SystemPackage("apt", "fetches the private QEMU and guest kernels", _program("apt-get")),
    SystemPackage("dpkg", "unpacks the private QEMU and guest kernels", _program("dpkg-deb")),
    SystemPackage(
        "debian-archive-keyring",
        "checks the signatures of the Debian archive",
        _file(
            "/usr/share/keyrings/debian-archive-keyring.pgp", "/usr/share/keyrings/debian-archive-keyring.gpg"
        ),
    ),
)
SYSTEM_PACKAGES = (
    SystemPackage("mmdebstrap", "installs the Debian system for the system disk", _program("mmdebstrap")),
    SystemPackage(
        "e2fsprogs",
        "makes the file system of the Debian system disk",
        _file("/usr/sbin/mke2fs", "/sbin/mke2fs"),
    ),
    SystemPackage(
        "fdisk", "makes the partition of the Debian system disk", _file("/usr/sbin/sfdisk", "/sbin/sfdisk")
    ),
)


def missing_packages(packages: Iterable[SystemPackage] = BUILD_PACKAGES) -> tuple[SystemPackage, ...]:
    return tuple(package for package in packages if not package.there())


def install_line(packages: Iterable[SystemPackage]) -> str:
    """Return what a user types to install ``packages``."""
    names = " ".join(package.name for package in packages)
    if shutil.which("apt-get") is None:
        return f"install the packages of your distribution for {names}"
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install {names}"


def ensure(packages: Iterable[SystemPackage] = BUILD_PACKAGES, stream: TextIO | None = None) -> None:
    """Install what is missing of ``packages`` if possible (as root, with apt), and report it on ``stream``.

    Raises :class:`MissingRequirement` with the line to type if that is not possible, or failed.
    """
    missing = missing_packages(packages)
    if not missing:
        return
    names = [package.name for package in missing]
    why = "; ".join(f"{package.name}: {package.purpose}" for package in missing)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise MissingRequirement(f"this machine lacks {' '.join(names)} ({why}): {install_line(missing)}")
    say(f"installing {' '.join(names)} with apt-get ({why})", stream)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *names]):
        done = subprocess.run(
            ["apt-get", "-qq", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode and command[0] == "install":
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise MissingRequirement(f"{install_line(missing)} failed: {reason[0]}")
