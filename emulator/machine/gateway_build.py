"""Compiles the trap gateway for this machine, once for each version of its source.

The plug-in is a few hundred lines of C without dependencies, so the user's compiler makes it when it is first
needed, rather than a wheel carrying a binary for every system.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from emulator.errors import InternalError, MissingRequirement
from emulator.provision.cache import cache_folder

SOURCE = Path(__file__).parent.parent / "gateway"
FLAGS = ("-std=c11", "-Wall", "-Wextra", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")


def compiler() -> str:
    """The C compiler: ``$CC``, ``cc``, ``gcc`` or ``clang``. Raises :class:`MissingRequirement`."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise MissingRequirement(
        "the trap gateway has to be compiled once, and there is no C compiler: "
        "apt-get install gcc libc6-dev (Debian, Ubuntu), dnf install gcc (Fedora)"
    )


def library_path(cache: Path | None = None) -> Path:
    """Where the library of this version is, or will be."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return (cache or cache_folder()) / f"vmbus-gateway-{digest.hexdigest()[:16]}.so"


def build(cache: Path | None = None) -> Path:
    """The compiled plug-in, ready for QEMU's ``-plugin``; compiles it if the cache has none of this version.

    Raises :class:`~emulator.errors.MissingRequirement` where there is no compiler, or no C library to compile with.
    """
    library = library_path(cache)
    if library.exists():
        return library
    command = compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        target = Path(scratch) / library.name
        files = [str(path) for path in _sources() if path.suffix == ".c"]
        result = subprocess.run(
            [command, *FLAGS, "-o", str(target), *files], capture_output=True, text=True, check=False
        )
        if result.returncode:
            if "stdio.h" in result.stderr:
                raise MissingRequirement(
                    "the C library's headers are missing: apt-get install libc6-dev (Debian, Ubuntu)"
                )
            raise InternalError(f"{command} does not compile the trap gateway:\n{result.stderr}")
        target.replace(library)  # whole or not at all, also when two build at once
    return library


def _sources() -> list[Path]:
    return sorted([*SOURCE.glob("*.c"), *SOURCE.glob("*.h")])
