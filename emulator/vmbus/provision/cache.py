"""The cache folder, for everything that is fetched or built.

    CACHE/apt/CODENAME/          private apt state (lists, partly downloaded packages)
    CACHE/qemu/VERSION/          private QEMU, unpacked
    CACHE/busybox/VERSION/       the guest's userspace
    CACHE/firmware/VERSION/      UEFI firmware for guests
    CACHE/kernels/GUEST/RELEASE/ guest kernels
    CACHE/initramfs/HASH.cpio    built initramfs images
    CACHE/systems/HASH/          a disk with a Debian system
    CACHE/modules/HASH.json      what was read from a kernel's modules
    CACHE/lock                   held while something is set up

CACHE is ``$VMBUS_CACHE``, else ``$XDG_CACHE_HOME/vmbus``, else ``~/.cache/vmbus``.

A folder of the cache is either complete or absent: it is filled under another name and renamed at the end, with a
``stamp.json`` in it that describes the contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vmbus import durable
from vmbus.errors import UserError
from vmbus.private import SHARED_UMASK, check_trusted, share, umask

STAMP = "stamp.json"


def cache_folder() -> Path:
    """Return the cache folder; it may not exist yet. Raises :class:`UserError` without a home folder."""
    chosen, base = os.environ.get("VMBUS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen) if chosen else Path(base or "~/.cache") / "vmbus"
    try:
        return folder.expanduser().absolute()
    except RuntimeError as error:  # as where a container runs under a number that no user has
        raise UserError(
            f"there is no home folder for {folder}: set VMBUS_CACHE to the whole path of a folder"
        ) from error


def make_folder(folder: Path) -> Path:
    """Create ``folder`` unless it exists, and return it. Raises :class:`UserError` if that is not possible."""
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        with umask(SHARED_UMASK):
            folder.mkdir(parents=True, exist_ok=True)
        for each in missing:
            share(each)
    except OSError as error:
        raise UserError(
            f"cannot create {folder}: {error.strerror}; set VMBUS_CACHE to a folder that you can write to"
        ) from error
    return folder


def check(path: Path) -> Path:
    """Return ``path``, which is in the cache and will be executed or filled.

    Raises :class:`UserError` if a user other than this one and root can change it.
    """
    check_trusted(path, "remove it and run `vmbus setup` again, or set VMBUS_CACHE to a folder of yours")
    return path


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of the cache ``folder``. ``waiting`` is called once if another process holds it.

    Raises as :func:`check`.
    """
    make_folder(folder)
    check(folder)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def filling(folder: Path, stamp: Mapping[str, object]) -> Iterator[Path]:
    """Give a temporary folder that becomes ``folder``, with ``stamp`` in it, if the block ends without an error."""
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".filling-", dir=folder.parent))
    try:
        with umask(SHARED_UMASK):
            yield temporary
            (temporary / STAMP).write_text(json.dumps(dict(stamp), indent=1, sort_keys=True) + "\n")
        for root, _, names in os.walk(temporary):
            for each in (Path(root), *(Path(root, name) for name in names)):
                if not each.is_symlink():
                    share(each)
        durable.synchronize_tree(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        durable.replace(temporary, folder)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def sweep(parent: Path) -> None:
    """Remove what an interrupted setup left unfinished below ``parent``. The lock must be held."""
    for leftover in parent.glob(".filling-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read_stamp(folder: Path) -> dict[str, object] | None:
    """Return the stamp of a complete folder, else None."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def complete_folders(parent: Path) -> list[tuple[Path, dict[str, object]]]:
    """Return the complete folders below ``parent`` with their stamps, the newest first."""
    found = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        if not folder.name.startswith(".") and (stamp := read_stamp(folder)) is not None:
            found.append(((folder / STAMP).stat().st_mtime_ns, folder, stamp))
    return [(folder, stamp) for _, folder, stamp in sorted(found, key=lambda item: item[0], reverse=True)]


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader sees either all of it or nothing."""
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)  # by its name, it could be another file's by now
            file.flush()
            os.fsync(file.fileno())
        durable.replace(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
