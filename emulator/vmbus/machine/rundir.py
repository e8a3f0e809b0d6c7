"""A guest's run directory: its sockets, its memory file and its logs; mode 0700, removed when the guest ends.

``$XDG_RUNTIME_DIR/vmbus/NAME``; without that variable ``/dev/shm/vmbus-UID/NAME``. The memory file is put where
it has room: in the run directory if its file system has enough, otherwise in ``/dev/shm``.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import MissingRequirement, UsageError, UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def runtime_root() -> Path:
    """Return the directory of this user's run directories."""
    chosen = os.environ.get("XDG_RUNTIME_DIR")
    if chosen and Path(chosen).is_dir():
        return Path(chosen) / "vmbus"
    return Path("/dev/shm") / f"vmbus-{os.getuid()}"


def _private(path: Path) -> None:
    """Make ``path`` a directory of this user alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"{path} exists and is not a directory of yours; remove it or set XDG_RUNTIME_DIR")
    path.chmod(0o700)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of one guest."""

    path: Path
    memory: Path

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
    def qemu_log(self) -> Path:
        return self.path / "qemu.log"

    @property
    def acpi_table(self) -> Path:
        return self.path / "vmbus.aml"

    def remove_machine(self) -> None:
        """Remove the files of one QEMU; the whole directory, if it is inside of another guest's."""
        self.memory.unlink(missing_ok=True)
        if (self.path.parent / "control.sock").exists():
            shutil.rmtree(self.path, ignore_errors=True)
        for path in (self.qmp, self.user_qmp, self.qtest, self.gateway, self.dbus, self.command):
            path.unlink(missing_ok=True)

    def point_to(self, inner: RunDirectory) -> None:
        """Link to the files in ``inner`` that other programs use: the guest has moved to the QEMU there."""
        for own, other in ((self.user_qmp, inner.user_qmp), (self.qemu_log, inner.qemu_log)):
            own.unlink(missing_ok=True)
            own.symlink_to(other)

    def remove(self) -> None:
        """Remove everything of the guest; a file that does not exist is no error."""
        self.memory.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def check_name(name: str) -> str:
    """Return ``name`` if it can be a directory. Raises :class:`~vmbus.errors.UsageError`."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a guest name: use at most 64 letters, digits, '.', '_' and '-', and begin with a "
            "letter or a digit"
        )
    return name


def create(name: str | None, memory_size: int, *, memory_of: Path | None = None) -> RunDirectory:
    """Make a new, empty run directory; its name is ``guest-N`` if ``name`` is ``None``.

    ``memory_of``: memory file of a guest that will arrive without a copy of its memory.

    Raises :class:`~vmbus.errors.UserError` when a guest of that name runs, and
    :class:`~vmbus.errors.MissingRequirement` when no memory file system has ``memory_size`` bytes.
    """
    root = runtime_root()
    _private(root)
    if name is None:
        number = 1
        while True:
            try:
                (root / f"guest-{number}").mkdir(mode=0o700)
            except FileExistsError:
                number += 1
                continue
            path = root / f"guest-{number}"
            break
    else:
        path = root / check_name(name)
        if path.exists():
            if is_served(path):
                raise UserError(f"a guest named {name} runs already ({path}); choose another --name")
            shutil.rmtree(path)  # its process was killed
        path.mkdir(mode=0o700)
    return RunDirectory(path, _memory_path(path, memory_size, path.name, memory_of))


def within(
    guest: RunDirectory, name: str, memory_size: int, *, memory_of: Path | None = None
) -> RunDirectory:
    """Make a directory inside of a guest's, for a QEMU that the guest moves to. As :func:`create`."""
    path = guest.path / name
    path.mkdir(mode=0o700)
    return RunDirectory(path, _memory_path(path, memory_size, f"{guest.name}-{name}", memory_of))


def _memory_path(path: Path, size: int, name: str, memory_of: Path | None) -> Path:
    shm = Path("/dev/shm")
    candidates = (path / "memory", shm / f"vmbus-{os.getuid()}-{name}.memory")
    if memory_of is not None:
        return _second_name(memory_of, candidates)
    for candidate in candidates:
        room = os.statvfs(candidate.parent)
        # The file is sparse: the guest's working set has to fit, with some reserve.
        if room.f_bavail * room.f_frsize >= min(size, 1 << 30):
            candidate.unlink(missing_ok=True)
            return candidate
    raise MissingRequirement(
        f"neither {path} nor {shm} has room for {size >> 20} MiB of guest memory; give the guest less (--memory), "
        "free some space there, or set XDG_RUNTIME_DIR to a directory with room"
    )


def _second_name(memory: Path, candidates: Sequence[Path]) -> Path:
    """Give a memory file one more name: each QEMU that has it open removes its own."""
    for candidate in candidates:
        candidate.unlink(missing_ok=True)
        try:
            candidate.hardlink_to(memory)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise UserError(f"cannot share the memory file {memory}: {error.strerror}") from error
        else:
            return candidate
    raise UserError(f"the memory file {memory} is on another file system than {candidates[0].parent}")


def is_served(path: Path) -> bool:
    """Return whether an emulator listens on the control socket of this run directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path / "control.sock"))
        except OSError:
            return False
    return True


def find(name: str | None) -> Path:
    """Return the run directory of a served guest; without a name, of the only one.

    Raises :class:`~vmbus.errors.UserError` when there is none, or several and no name.
    """
    root = runtime_root()
    served = sorted(p for p in root.iterdir() if is_served(p)) if root.is_dir() else []
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
