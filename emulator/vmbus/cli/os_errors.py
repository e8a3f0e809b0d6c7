"""Errors of the operating system, as sentences for the user: what happened to which file, and what to do."""

from __future__ import annotations

import errno
import os
import socket

_WHAT_TO_DO = {
    errno.EACCES: "give yourself the right to use it, or name another place",
    errno.EPERM: "give yourself the right to do this, or name another place",
    errno.EROFS: "name another place",
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "check the name",
    errno.EISDIR: "name a file in it",
    errno.ELOOP: "name the file that the links lead to",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "close some programs",
    errno.ENOEXEC: "install it again",
}


def os_sentence(error: OSError) -> str:
    """Return what happened, to which file if that is known, and what to do if there is a usual answer."""
    if isinstance(error, socket.gaierror):
        return f"a host name is not known here ({error.strerror}): check its spelling"
    what = error.strerror or str(error) or type(error).__name__
    names = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
    ]
    where = f"{' and '.join(names)}: " if names else ""
    then = _WHAT_TO_DO.get(error.errno or 0)
    return f"{where}{what}" + (f"; {then}" if then else "")
