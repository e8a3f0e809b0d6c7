"""Snapshots of a raw file: copies in a folder that the user named.

    FOLDER/NAME-HASH.SNAPSHOT     the content at one moment, with the holes of the file
    FOLDER/.NAME-HASH.SNAPSHOT    a copy that is not complete; removed by the next save

``NAME`` is that of the file, ``HASH`` of its path: files of one name do not meet in one folder. Where the file system
can share blocks (Btrfs, XFS, bcachefs), a copy takes no time and, at first, no room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from vmbus import durable
from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus.errors import DeviceError, UserError
from vmbus.private import check_trusted

from vmbus_devices.scsi.file import FileBackend, punch_hole

_FICLONE = 0x40049409
_STEP = 64 << 20
"""Bytes that one system call copies."""
_NOT_SHARED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ETXTBSY, errno.ENOSYS)
_NOT_COPIED = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
_PART = "."
"""What the name of a copy begins with until it is complete."""
_SAFE = " !#$&'()+,-.:;=@[]^_{}~"
"""Characters of a snapshot's name that stay as they are in the name of a file."""
_MAX_FILE_NAME = 255


class FileCopies:
    """The copies of one raw file: :class:`~vmbus.bus.io.snapshots.SnapshotDisk`.

    Raises :class:`~vmbus.errors.UserError` for a folder that cannot be used, and for a block device.
    """

    def __init__(self, backend: FileBackend, folder: Path) -> None:
        if not stat.S_ISREG(os.fstat(backend.fd).st_mode):
            raise UserError("copies= is for files; of a block device make snapshots with its own tools")
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"copies={folder}: not a folder that can be written to; make it first")
        check_trusted(folder, "choose a folder for copies= that only you can change")
        self._backend = backend
        self._folder = folder
        where = hashlib.sha256(os.fsencode(backend.path.resolve())).hexdigest()[:8]
        self._prefix = f"{backend.path.name}-{where}."

    @property
    def size(self) -> int:
        return self._backend.size

    def snapshots(self) -> Sequence[DiskSnapshot]:
        try:
            with os.scandir(self._folder) as entries:
                found = [
                    DiskSnapshot(
                        unquote(each.name[len(self._prefix) :]),
                        self._backend.rounded(each.stat(follow_symlinks=False).st_size),
                    )
                    for each in entries
                    if each.name.startswith(self._prefix) and each.is_file(follow_symlinks=False)
                ]
        except OSError as error:
            raise self._failed("the copies cannot be listed", error) from error
        return sorted(found, key=lambda each: each.name)

    def save_snapshot(self, name: str) -> None:
        path = self._path(name)
        part = path.with_name(_PART + path.name)
        try:
            if path.exists():
                raise DeviceError(f"there is a copy {path} already")
            for old in self._folder.iterdir():  # of a process that ended while it copied
                if old.name.startswith(_PART + self._prefix):
                    old.unlink()
            try:
                with self._source() as source, _opened(part, os.O_RDWR | os.O_CREAT | os.O_EXCL) as copy:
                    _copy(source, copy)
                durable.synchronize(part)
                durable.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._failed(f"the copy {path.name} cannot be made", error) from error

    def load_snapshot(self, name: str, *, keep: str | None = None) -> None:
        path = self._path(name)
        try:
            with _opened(path, os.O_RDONLY) as copy:
                if os.fstat(copy).st_size != os.fstat(self._backend.fd).st_size:
                    raise DeviceError(f"{path} has another size than {self._backend.path}")
                if keep is not None:
                    self.save_snapshot(keep)
                try:
                    self._put_back(copy)
                except OSError as error:
                    if keep is None:
                        raise
                    self._undo(keep, error)
                    raise
        except OSError as error:
            raise self._failed(f"the copy {path.name} cannot be put back", error) from error

    def delete_snapshot(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink()
            durable.synchronize(self._folder)
        except OSError as error:
            raise self._failed(f"the copy {path.name} cannot be deleted", error) from error

    def _undo(self, keep: str, why: OSError) -> None:
        """Go back to ``keep``: parts of the file may have been written."""
        try:
            with _opened(self._path(keep), os.O_RDONLY) as copy:
                self._put_back(copy)
            self.delete_snapshot(keep)
        except (OSError, DeviceError) as error:
            raise DeviceError(
                f"{why.strerror}; what was in {self._backend.path} is in its copy {self._path(keep)}, which could "
                f"not be put back: {error}"
            ) from error

    def _put_back(self, copy: int) -> None:
        with self._source(os.O_RDWR) as file:
            _copy(copy, file)
            os.fsync(file)

    def _source(self, flags: int = os.O_RDONLY) -> contextlib.AbstractContextManager[int]:
        """Open the file of the disk once more: its locks stay, and the copy needs no direct I/O."""
        return _opened(Path(f"/proc/self/fd/{self._backend.fd}"), flags, follow=True)

    def _path(self, name: str) -> Path:
        found = self._prefix + quote(name, safe=_SAFE)
        if len(os.fsencode(_PART + found)) > _MAX_FILE_NAME:
            raise DeviceError(f"the name of the copy, {found}, is too long for a file; choose a shorter name")
        return self._folder / found

    def _failed(self, what: str, error: OSError) -> DeviceError:
        return DeviceError(f"{what} in {self._folder}: {error.strerror}")


@contextlib.contextmanager
def _opened(path: Path, flags: int, *, follow: bool = False) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _copy(source: int, target: int) -> None:
    """Give the file ``target`` the content, the size and the holes of ``source``. Raises ``OSError``."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in _NOT_SHARED:
            raise
    size, at = os.fstat(source).st_size, 0
    os.truncate(target, size)
    while at < size:
        data = _next(source, at, os.SEEK_DATA, size)
        if data > at:
            punch_hole(target, at, data - at)
        at = data
        end = _next(source, at, os.SEEK_HOLE, size)
        while at < end:
            at += _copy_range(source, target, at, min(end - at, _STEP))


def _next(fd: int, at: int, what: int, size: int) -> int:
    try:
        return min(os.lseek(fd, at, what), size) if at < size else size
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return size
        raise


def _copy_range(source: int, target: int, at: int, length: int) -> int:
    """Copy some bytes to the same place; return how many. Raises ``OSError``."""
    try:
        done = os.copy_file_range(source, target, length, at, at)
    except OSError as error:
        if error.errno not in _NOT_COPIED:
            raise
        done = os.pwrite(target, os.pread(source, min(length, 1 << 20), at), at)
    if not done:
        raise OSError(errno.EIO, f"the file ends at byte {at}")
    return done
