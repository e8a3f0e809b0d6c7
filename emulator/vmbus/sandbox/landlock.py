"""Landlock: a process without privileges gives up access to all files but those that it names.

Source: Linux, Documentation/userspace-api/landlock.rst. What a kernel of an older Landlock cannot restrict stays
allowed; :func:`version` is 0 for a kernel without Landlock.

A ruleset is made in the parent and entered by the child between ``fork`` and ``exec``: the child then only makes one
system call, and a path that cannot be opened is found out by the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vmbus.sandbox.kernel import call

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << n for n in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_RIGHTS_OF_VERSION = {
    1: (1 << 13) - 1,
    2: (1 << 14) - 1,
    3: (1 << 15) - 1,
    4: (1 << 15) - 1,
    5: (1 << 16) - 1,
}
_OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
"""The rights that a rule for something else than a folder may have."""

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
CHANGE = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV
OWN = CHANGE | REMOVE_FILE | REMOVE_DIR | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_SYM | REFER
"""What a process may do in a folder of its own; it can run nothing there."""

_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1 << 0, 1 << 1


@functools.cache
def version() -> int:
    """Return the version of the kernel's Landlock interface; 0 without Landlock, or where it is switched off."""
    try:
        return call(_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def has_scopes() -> bool:
    """Return whether this kernel can keep signals and connections to abstract sockets inside."""
    return version() >= 6


def _rights() -> int:
    """Return the rights on files that this kernel restricts."""
    return _RIGHTS_OF_VERSION[min(version(), max(_RIGHTS_OF_VERSION))]


@dataclass(frozen=True, slots=True)
class Access:
    """What may be done with a file, or with all that is in a folder."""

    path: Path
    rights: int


class Ruleset:
    """A set of rules that a process can enter. The kernel keeps files by identity: a name may change afterwards."""

    def __init__(self, access: Iterable[Access] | None, *, tcp: bool) -> None:
        """``access``: ``None`` leaves files alone. ``tcp``: whether TCP ports may be bound and connected to.

        Paths that cannot be looked up are left out: the process could not open them either. Raises ``OSError`` for a
        kernel without Landlock.
        """
        self._rights = _rights() if version() and access is not None else 0
        network = 0 if tcp or version() < 4 else _BIND_TCP | _CONNECT_TCP
        scope = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if has_scopes() else 0
        # An older kernel refuses a longer structure only if what it does not know is not zero.
        attributes = ctypes.create_string_buffer(struct.pack("=QQQ", self._rights, network, scope), 24)
        self._fd = call(_CREATE_RULESET, ctypes.addressof(attributes), len(attributes), 0)
        try:
            for each in access or ():
                self._allow(each)
        except BaseException:
            self.close()
            raise

    def _allow(self, access: Access) -> None:
        try:
            path = os.open(access.path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            rights = access.rights & self._rights
            if not stat.S_ISDIR(os.fstat(path).st_mode):
                rights &= _OF_A_FILE
            if rights:
                rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, path), 12)
                call(_ADD_RULE, self._fd, _RULE_PATH_BENEATH, ctypes.addressof(rule), 0)
        finally:
            os.close(path)

    def enter(self) -> None:
        """Restrict the calling thread, and what it starts, to these rules; it must have ``no_new_privs``."""
        call(_RESTRICT_SELF, self._fd, 0)

    def close(self) -> None:
        """Close the descriptor; safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
