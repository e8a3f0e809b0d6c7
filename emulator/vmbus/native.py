"""Compiles the parts that are C, for this machine, once for each version of their source.

They are a few hundred lines without dependencies, so the user's compiler makes them when they are first needed,
rather than a wheel carrying a binary for every system.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path

from vmbus import durable
from vmbus.errors import InternalError, MissingRequirement
from vmbus.private import SHARED_UMASK, share, umask
from vmbus.provision.cache import cache_folder, check, make_folder

KEPT_DAYS = 30
"""Days that a library stays in the cache after its last use."""

FLAGS = ("-std=c11", "-Wall", "-Wextra", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")


def compiler() -> str:
    """The C compiler: ``$CC``, ``cc``, ``gcc`` or ``clang``. Raises :class:`MissingRequirement`."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise MissingRequirement(
        "parts of the emulator have to be compiled once, and there is no C compiler: "
        "apt-get install gcc libc6-dev (Debian, Ubuntu), dnf install gcc (Fedora)"
    )


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """A shared library made of the ``*.c`` and ``*.h`` of a folder."""

    name: str
    """Of the file, without ending."""
    what: str
    """For messages."""
    source: Traversable
    """A folder; ``importlib.resources.files`` gives one that is also found in a zipped package."""
    flags: tuple[str, ...] = FLAGS
    libraries: tuple[str, ...] = ()
    generated: Mapping[str, str] = field(default_factory=dict)
    """More headers: name → text."""

    @property
    def name_in_reports(self) -> str:
        """:attr:`what` without its article: "fast path"."""
        return self.what.removeprefix("the ")

    def path(self, cache: Path | None = None) -> Path:
        """Where the library of this version is, or will be."""
        digest = hashlib.sha256(" ".join((*self.flags, *self.libraries)).encode())
        for path in self._sources():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        for name, text in sorted(self.generated.items()):
            digest.update(name.encode() + b"\0" + text.encode())
        return (cache or cache_folder()) / f"{self.name}-{digest.hexdigest()[:16]}.so"

    def build(self, cache: Path | None = None) -> Path:
        """The library; compiles it if the cache has none of this version.

        Raises :class:`~vmbus.errors.MissingRequirement` where there is no compiler, or no C library to compile
        with, and :class:`~vmbus.errors.UserError` where another user could change the library.
        """
        library = self.path(cache)
        check(make_folder(library.parent))
        if library.exists():
            if _used(library) < time.time() - 86400:
                with contextlib.suppress(OSError):  # another user's cache
                    os.utime(library)  # for _prune, of another version
            return check(library)
        command = compiler()
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
            target = Path(scratch) / library.name
            files = map(str, self.write_sources(Path(scratch)))
            line = [command, *self.flags, "-o", str(target), *files, *self.libraries]
            with umask(SHARED_UMASK):
                result = subprocess.run(line, capture_output=True, text=True, check=False)
            if result.returncode:
                if "stdio.h" in result.stderr:
                    raise MissingRequirement(
                        "the C library's headers are missing: apt-get install libc6-dev (Debian, Ubuntu)"
                    )
                raise InternalError(f"{command} does not compile {self.what}:\n{result.stderr}")
            share(target)
            durable.synchronize(target)
            durable.replace(target, library)  # whole or not at all, also when two build at once
        self._prune(library)
        return library

    def _prune(self, library: Path) -> None:
        """Remove other versions of ``library`` that nobody has used for :data:`KEPT_DAYS` days, nor uses now.

        A running guest needs the file of its gateway again when it moves into a new QEMU.
        """
        last = time.time() - KEPT_DAYS * 86400
        old = [
            each
            for each in library.parent.glob(f"{self.name}-*.so")
            if each != library and _used(each) < last
        ]
        if not old:
            return
        in_use = _mapped_files()
        for each in old:
            if str(each.resolve()) not in in_use:
                with contextlib.suppress(OSError):  # another user's, or gone already
                    each.unlink()

    def write_sources(self, folder: Path) -> list[Path]:
        """Write all sources and generated headers into ``folder``; return the files to compile, sorted."""
        for name, text in self.generated.items():
            (folder / name).write_text(text)
        for source in self._sources():
            (folder / source.name).write_bytes(source.read_bytes())
        return sorted(folder.glob("*.c"))

    def _sources(self) -> list[Traversable]:
        found = [each for each in self.source.iterdir() if each.name.endswith((".c", ".h"))]
        return sorted(found, key=lambda each: each.name)


def _used(library: Path) -> float:
    """Return when a library was used last, in seconds of ``time.time``; now if that is unknown."""
    try:
        return library.stat().st_mtime
    except OSError:
        return time.time()


def _mapped_files() -> set[str]:
    """Return the paths of all files that processes have mapped, as far as this user can see them."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # another user's process, or one that has ended
            for line in maps.read_text(errors="surrogateescape").splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) > 5:
                    found.add(fields[5])
    return found
