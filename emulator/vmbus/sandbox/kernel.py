"""The system calls of the sandbox, through ctypes: libc has no functions for most of them."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long


def call(number: int, *arguments: int) -> int:
    """Call the kernel; return the result. Raises ``OSError``."""
    result = int(_syscall(ctypes.c_long(number), *[ctypes.c_long(each) for each in arguments]))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def prctl(option: int, *arguments: int) -> int:
    """Call ``prctl`` with up to four arguments; return the result. Raises ``OSError``."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    result = int(libc.prctl(ctypes.c_int(option), *[ctypes.c_ulong(each) for each in padded]))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
