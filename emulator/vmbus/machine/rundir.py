"""A guest's run directory: its sockets, its memory file and its logs; mode 0700, removed when the guest ends.

``$XDG_RUNTIME_DIR/vmbus/NAME``; without that variable ``/dev/shm/vmbus-UID/NAME``. The memory file is put where
it has room: in the run directory if its file system has enough, otherwise in a folder of its own in ``/dev/shm``,
whose name cannot be guessed.

A process holds a lock (``flock``) on each folder that it uses, from the moment it makes it until it ends. A folder
without a lock was left by a process that was killed; whoever makes the next run directory removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmbus import private
from vmbus.errors import UsageError, UserError
from vmbus.machine import memory_file, unix_path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


_FALLBACK = Path("/dev/shm")
"""Where the directory of the run directories is without ``$XDG_RUNTIME_DIR``; others can make files there."""


def runtime_root() -> Path:
    """Return the directory of this user's run directories."""
    chosen = os.environ.get("XDG_RUNTIME_DIR")
    if chosen and Path(chosen).is_dir():
        return Path(chosen) / "vmbus"
    return _FALLBACK / f"vmbus-{os.getuid()}"


_STARTING = 60.0
"""Seconds for which a folder without a lock may belong to a guest that a version without locks is starting."""


def memory_root() -> Path:
    """Return the directory for memory files that have no room in their run directory."""
    return Path("/dev/shm")


_LONGEST_SOCKET = "m9/emulator-qmp.sock"
"""The longest path of a socket of QEMU, below the run directory."""


@dataclass(slots=True)
class RunDirectory:
    """The paths of one guest."""

    path: Path
    memory: Path
    _locks: list[int] = field(default_factory=list, repr=False, compare=False)
    """Descriptors of the folders, which hold their locks."""
    inner: bool = False
    """Whether it is inside of a guest's, for a QEMU that the guest moves to."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def qmp(self) -> Path:
        """The emulator's own QMP socket."""
        return self.path / "emulator-qmp.sock"

    @property
    def user_qmp(self) -> Path:
        """A second QMP socket, for the user and other programs."""
        return self.path / "qmp.sock"

    @property
    def qtest(self) -> Path:
        return self.path / "qtest.sock"

    @property
    def gateway(self) -> Path:
        return self.path / "gateway.sock"

    @property
    def dbus(self) -> Path:
        """The socket of the D-Bus daemon that carries the emulator's state."""
        return self.path / "dbus.sock"

    @property
    def command(self) -> Path:
        """The guest's second serial port: output of the command that it runs."""
        return self.path / "command.sock"

    @property
    def control(self) -> Path:
        """The control socket of the emulator, for ``vmbus status`` and other commands."""
        return self.path / "control.sock"

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @property
    def console_socket(self) -> Path:
        """The guest's first serial port, of which this process writes :attr:`console`."""
        return self.path / "console.sock"

    @property
    def qemu_log(self) -> Path:
        return self.path / "qemu.log"

    @property
    def acpi_table(self) -> Path:
        return self.path / "vmbus.aml"

    async def make_memory(self, size: int, memory_of: Path | None = None, *, reserve: bool = True) -> None:
        """Make the memory file, of ``size`` bytes; :attr:`memory` is its path from then on.

        ``memory_of``: memory file of a guest that will arrive without a copy of its memory; this directory gets one
        more name of it. ``reserve``: take all of its room now, so that it cannot be full later.

        Raises :class:`~vmbus.errors.MissingRequirement` when no memory file system has the room, and
        :class:`~vmbus.errors.UserError` when ``memory_of`` cannot be shared.
        """
        try:
            if memory_of is None:
                self.memory = await memory_file.make(self._places(), size, reserve=reserve)
            else:
                self.memory = memory_file.second_name(memory_of, self._places())
        except BaseException:
            self._remove_memory()
            raise

    def _places(self) -> Iterator[Path]:
        self.memory = self.path / "memory"
        yield self.memory
        if memory_root().is_dir():
            folder, lock = _new_locked(memory_root(), _memory_prefix())
            self._locks.append(lock)
            self.memory = folder / "memory"
            yield self.memory

    def _remove_memory(self) -> None:
        self.memory.unlink(missing_ok=True)
        if self.memory.parent != self.path:
            with contextlib.suppress(FileNotFoundError):
                self.memory.parent.rmdir()

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def remove_machine(self) -> None:
        """Remove the files of one QEMU; the whole directory, if it is :attr:`inner`."""
        self._remove_memory()
        if self.inner:
            shutil.rmtree(self.path, ignore_errors=True)
            self._unlock()
        sockets = (
            self.qmp,
            self.user_qmp,
            self.qtest,
            self.gateway,
            self.dbus,
            self.command,
            self.console_socket,
        )
        for path in sockets:
            path.unlink(missing_ok=True)

    def point_to(self, inner: RunDirectory) -> None:
        """Link to the files in ``inner`` that other programs use: the guest has moved to the QEMU there."""
        for own, other in ((self.user_qmp, inner.user_qmp), (self.qemu_log, inner.qemu_log)):
            own.unlink(missing_ok=True)
            own.symlink_to(other)

    def remove(self) -> None:
        """Remove everything of the guest; a file that does not exist is no error."""
        self._remove_memory()
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()


def check_name(name: str) -> str:
    """Return ``name`` if it can be a directory. Raises :class:`~vmbus.errors.UsageError`."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a guest name: use at most 64 letters, digits, '.', '_' and '-', and begin with a "
            "letter or a digit"
        )
    return name


def create(name: str | None, *, qemu: bool = True) -> RunDirectory:
    """Make a new, empty run directory; its name is ``guest-N`` if ``name`` is ``None``.

    ``qemu``: a QEMU will have its sockets there. What dead processes left is removed.

    Raises :class:`~vmbus.errors.UserError` when a guest of that name runs, or a path would be too long for a socket.
    """
    root = runtime_root()
    if name is not None:
        check_name(name)
    if qemu:
        _check_lengths(root, name)
    private.make_folder(root)
    with _locked(root):
        sweep(root)
        number = 1
        while True:
            path = root / (name or f"guest-{number}")
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                if name is not None:
                    if _remove_dead(path):
                        continue
                    raise UserError(
                        f"a guest named {name} runs already, or is being started or ended ({path}); choose another "
                        "--name"
                    ) from None
                number += 1
                continue
            lock = _try_lock(path)
            if lock is not None:
                return RunDirectory(path, path / "memory", [lock])


def within(guest: RunDirectory) -> RunDirectory:
    """Make a directory inside of a guest's, for a QEMU that the guest moves to."""
    number = 1
    while (path := guest.path / f"m{number}").exists():  # short: it is a part of the paths of sockets
        number += 1
    path.mkdir(mode=0o700)
    return RunDirectory(path, path / "memory", inner=True)


def _check_lengths(root: Path, name: str | None) -> None:
    longest = root / (name or "guest-999") / _LONGEST_SOCKET
    if unix_path.fits(longest):
        return
    left = unix_path.MAX_BYTES - len(os.fsencode(root / "n" / _LONGEST_SOCKET)) + 1
    shorter = f"choose a --name of at most {left} characters, or " if name and left > 0 else ""
    raise UserError(
        f"the path of a socket in the run directory would be too long: {longest} has {len(os.fsencode(longest))} "
        f"bytes, and the kernel takes {unix_path.MAX_BYTES}; {shorter}set XDG_RUNTIME_DIR to a shorter path"
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` in the block: one process at a time makes or sweeps what is in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of ``folder``; ``None`` if another has it, or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # 0: removed by who had the lock before
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _memory_prefix() -> str:
    return f"vmbus-{os.geteuid()}-memory-"


def _new_locked(root: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder with an unpredictable name, mode 0700; return it and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        lock = _try_lock(folder)  # fails if a sweep came in between
        if lock is not None:
            return folder, lock


def sweep(root: Path) -> None:
    """Remove run directories and memory of processes that were killed. The lock of ``root`` must be held."""
    for folder in (*root.iterdir(), *memory_root().glob(f"{_memory_prefix()}*")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if time.time() - folder.lstat().st_mtime > _STARTING:
                _remove_dead(folder)


def _remove_dead(folder: Path) -> bool:
    """Remove a folder whose process was killed; return whether that was so."""
    if (lock := _try_lock(folder)) is None:
        return False
    try:
        dead = os.fstat(lock).st_uid == os.geteuid() and not is_served(folder)
        if dead:
            shutil.rmtree(folder, ignore_errors=True)
        return dead and not folder.exists()
    finally:
        os.close(lock)


def is_served(path: Path) -> bool:
    """Return whether an emulator listens on the control socket of this run directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with unix_path.short(path / "control.sock") as address:
                probe.connect(address)
        except BlockingIOError:
            return True  # so many wait for its answer already that no more can
        except OSError:
            return False
    return True


def find(name: str | None) -> Path:
    """Return the run directory of a served guest; without a name, of the only one.

    Raises :class:`~vmbus.errors.UserError` when there is none, or several and no name.
    """
    root = runtime_root()
    there = root.is_dir()
    if there and root.parent == _FALLBACK and root.lstat().st_uid != os.geteuid():
        # Its name can be guessed: who has made it answers as any guest, and gets the descriptors of a request.
        raise UserError(
            f"{root} belongs to another user: remove it, or set XDG_RUNTIME_DIR to a folder of yours"
        )
    served = sorted(p for p in root.iterdir() if is_served(p)) if there else []
    if name is not None:
        check_name(name)
        for path in served:
            if path.name == name:
                return path
        known = ", ".join(path.name for path in served)
        others = f"served are: {known}" if known else "no guest is served; `vmbus run` starts one"
        raise UserError(f"no emulator serves a guest named {name}; {others}")
    if len(served) == 1:
        return served[0]
    if not served:
        raise UserError("no emulator runs; start one with `vmbus run` or `vmbus attach`")
    raise UserError(f"several guests run: name one of {', '.join(path.name for path in served)}")
