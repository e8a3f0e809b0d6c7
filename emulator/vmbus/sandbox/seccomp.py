"""seccomp: filters that refuse system calls with an error, as programs of classic BPF for x86-64.

A filter lists what is refused, and refuses with EPERM instead of a signal: what a library tries on the way, and can
do without, then harms nothing. Sources: Linux, Documentation/userspace-api/seccomp_filter.rst; numbers from
arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import struct
from collections.abc import Collection

from vmbus.sandbox.kernel import call

_SECCOMP = 317
_SET_MODE_FILTER, _GET_ACTION_AVAIL = 1, 2
_FLAG_TSYNC = 1
_RET_ERRNO, _RET_ALLOW = 0x00050000, 0x7FFF0000
_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
"""Offsets in ``struct seccomp_data``."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

CLONE, CLONE3 = 56, 435
CLONE_THREAD = 0x00010000
_NAMESPACES = 0x7E020000
"""CLONE_NEW* of ``clone``: mount, cgroup, UTS, IPC, user, PID and network."""

ALWAYS_REFUSED = {
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "pidfd_getfd": 438,
    "unshare": 272,
    "setns": 308,
    "chroot": 161,
    "pivot_root": 155,
    "mount": 165,
    "umount2": 166,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "init_module": 175,
    "finit_module": 313,
    "delete_module": 176,
    "kexec_load": 246,
    "kexec_file_load": 320,
    "bpf": 321,
    "perf_event_open": 298,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "open_by_handle_at": 304,
    "iopl": 172,
    "ioperm": 173,
    "modify_ldt": 154,
    "personality": 135,
    "reboot": 169,
    "swapon": 167,
    "swapoff": 168,
    "acct": 163,
    "quotactl": 179,
    "settimeofday": 164,
    "clock_settime": 227,
    "adjtimex": 159,
    "sethostname": 170,
    "setdomainname": 171,
}
"""What no process of the emulator has a use for: other processes' memory, namespaces, mounts, the kernel's doors."""

SOCKETS = {"socket": 41, "connect": 42, "bind": 49}
"""How a process gets a connection that it was not given."""

PROCESSES = {"fork": 57, "vfork": 58}
"""With ``threads_only``: how a process gets a child."""


@functools.cache
def available() -> bool:
    """Return whether this kernel has seccomp filters that refuse with an error, and its calls are known here."""
    if platform.machine() != "x86_64" or struct.calcsize("P") != 8:
        return False
    action = ctypes.c_uint32(_RET_ERRNO)
    try:
        call(_SECCOMP, _GET_ACTION_AVAIL, 0, ctypes.addressof(action))
    except OSError:
        return False
    return True


def program(refused: Collection[int], *, threads_only: bool = False) -> bytes:
    """Return the filter: EPERM for each number in ``refused``, for new namespaces, and for foreign system calls.

    ``threads_only``: ``clone`` makes threads, and no processes. ``clone3`` passes its flags in memory, where no
    filter sees them: ENOSYS makes libraries use ``clone``.
    """
    refuse = _RET_ERRNO | errno.EPERM
    # (operation, operand, distance if true, distance if false)
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, _ARCH, 0, 0),
        (_EQUAL, _ARCH_X86_64, 1, 0),
        (_RETURN, refuse, 0, 0),
        (_LOAD, _NR, 0, 0),
        (_AT_LEAST, _X32_BIT, 0, 1),
        (_RETURN, refuse, 0, 0),
        (_EQUAL, CLONE3, 0, 1),
        (_RETURN, _RET_ERRNO | errno.ENOSYS, 0, 0),
    ]
    for number in sorted(refused):
        code += [(_EQUAL, number, 0, 1), (_RETURN, refuse, 0, 0)]
    flags: list[tuple[int, int, int, int]] = [
        (_LOAD, _FIRST_ARGUMENT, 0, 0),
        (_ANY_BIT, _NAMESPACES, 0, 1),
        (_RETURN, refuse, 0, 0),
    ]
    if threads_only:
        flags += [(_ANY_BIT, CLONE_THREAD, 1, 0), (_RETURN, refuse, 0, 0)]
    code += [(_EQUAL, CLONE, 0, len(flags)), *flags, (_RETURN, _RET_ALLOW, 0, 0)]
    return b"".join(struct.pack("=HBBI", each[0], each[2], each[3], each[1]) for each in code)


class Filter:
    """A filter, ready to be entered between ``fork`` and ``exec``."""

    def __init__(self, code: bytes) -> None:
        self._code = ctypes.create_string_buffer(code, len(code))
        self._head = ctypes.create_string_buffer(
            struct.pack("@HP", len(code) // 8, ctypes.addressof(self._code))
        )

    def enter(self, *, all_threads: bool = False) -> None:
        """Confine the calling thread and what it starts, or this whole process. It must have ``no_new_privs``."""
        call(_SECCOMP, _SET_MODE_FILTER, _FLAG_TSYNC if all_threads else 0, ctypes.addressof(self._head))
