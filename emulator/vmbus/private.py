"""Files and folders that only this user can read or change, and the checks for those that others made.

Other users of the machine share ``/tmp`` and ``/dev/shm``, and sometimes a parent of the cache. What lies there under
a name that they can guess may be theirs; what is made there with the modes of the umask may be read by them.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from vmbus.errors import UserError

UMASK = 0o077
"""For a process that makes files of a guest: its memory, its state, its sockets."""
SHARED_UMASK = 0o022
"""For files that other users may read, but must not change: the cache."""


_enclosing: list[int] = []
"""What the umask was at the beginning of each :func:`umask` block that has not ended."""


@contextlib.contextmanager
def umask(bits: int) -> Iterator[None]:
    """Withhold the permissions ``bits`` from files that this process makes in the block."""
    before = os.umask(bits)
    os.umask(before | bits)
    _enclosing.append(before)
    try:
        yield
    finally:
        _enclosing.pop()
        os.umask(before)


def share(path: Path) -> None:
    """Let other users read the file or folder ``path`` as its owner may, as far as the user's own umask lets them.

    For what the cache gets while the files of a guest are made: it has the modes of those. To set the umask for a
    moment would let other threads make a guest's files with it.
    """
    users = _enclosing[0] if _enclosing else _current_umask()
    mode = stat.S_IMODE(path.stat().st_mode)
    readable = mode & 0o500
    path.chmod((mode | readable >> 3 | readable >> 6) & ~(users & 0o077))


def _current_umask() -> int:
    current = os.umask(UMASK)
    os.umask(current)
    return current


def make_folder(path: Path) -> None:
    """Make ``path`` a folder of this user alone, mode 0700; a missing parent is made as well.

    Raises :class:`~vmbus.errors.UserError` if something else is there, or others could put something else there.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the folder {path}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours"
        ) from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{path} exists and is not a folder of yours; remove it or set XDG_RUNTIME_DIR")
    path.chmod(0o700)
    check_trusted(path, "set XDG_RUNTIME_DIR to a folder that only you can change")


def check_only_mine(path: Path, remedy: str) -> None:
    """Raise :class:`~vmbus.errors.UserError` unless the folder ``path`` is this user's and closed to all others.

    ``remedy``: what to do, as the end of a sentence.
    """
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise UserError(
            f"{path} belongs to {_user(found.st_uid)}, who could read the guest's memory: {remedy}"
        )
    if found.st_mode & 0o077:
        raise UserError(
            f"other users can enter {path} (its mode is {stat.S_IMODE(found.st_mode):04o}) and could read the "
            f"guest's memory: {remedy}"
        )
    check_trusted(path, remedy)


def check_trusted(path: Path, remedy: str) -> None:
    """Raise :class:`~vmbus.errors.UserError` if another user can change ``path``, or put something else in its place.

    Root, and who owns ``/``, can do so anyway. In a sticky folder such as ``/tmp`` others cannot move what is not
    theirs. ``remedy``: what to do, as the end of a sentence.
    """
    path = path.absolute()
    trusted = {0, os.geteuid(), Path("/").stat().st_uid}
    for end in dict.fromkeys((path, path.resolve())):
        for place in (end, *end.parents):
            found = place.lstat()
            if found.st_uid not in trusted:
                raise UserError(
                    f"{place} belongs to {_user(found.st_uid)}, who could change {path}: {remedy}"
                )
            if stat.S_ISLNK(found.st_mode) or (place != end and found.st_mode & stat.S_ISVTX):
                continue
            if found.st_mode & 0o002 or (found.st_mode & 0o020 and not _is_private_group(found.st_gid)):
                raise UserError(
                    f"other users can write to {place} (its mode is {stat.S_IMODE(found.st_mode):04o}) and could "
                    f"change {path}: {remedy}"
                )


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user {number}"


def _is_private_group(number: int) -> bool:
    """Return whether a group has this user as its only member: where the umask is 002, each user has such a group."""
    if number == 0:
        return True
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return user.pw_gid == number and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
