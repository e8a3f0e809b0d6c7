"""What a process of the emulator gives up before it runs, as far as this kernel has the means.

``no_new_privs`` and resource limits are everywhere. Landlock and seccomp are left out on a kernel without them:
:func:`vmbus.sandbox.report.layers` tells which are in force.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from vmbus.sandbox import landlock, seccomp
from vmbus.sandbox.kernel import prctl

_PR_SET_NO_NEW_PRIVS = 38

_BASE_LIMITS: Mapping[int, int] = {resource.RLIMIT_CORE: 0}
"""A core file would hold guest memory and keys, in a folder that the crashed program did not choose."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """The limits of one process. Nothing can be taken back, and children inherit all of it."""

    access: tuple[landlock.Access, ...] | None = None
    """All that it may do with files; ``None``: what its user may do."""
    tcp: bool = True
    """Whether it may bind and connect to TCP ports; needs ``access``."""
    inside: bool = False
    """With all files: whether its signals and its connections to abstract sockets reach only what it has started.
    With ``access`` that is so in any case."""
    refused: frozenset[int] = field(default_factory=lambda: frozenset(seccomp.ALWAYS_REFUSED.values()))
    """Numbers of system calls that fail with EPERM."""
    threads_only: bool = False
    """Whether it can make threads, but no processes."""
    limits: Mapping[int, int] = field(default_factory=dict)
    """``RLIMIT_*`` → value, besides the one against core files."""


class _Mode:
    enabled = True


def enabled() -> bool:
    """Return whether processes are confined: everywhere but under ``--sandbox off``."""
    return _Mode.enabled


def enable(on: bool) -> None:
    """Confine the processes that are started from now on, or do not."""
    _Mode.enabled = on


@contextlib.contextmanager
def prepared(confinement: Confinement | None) -> Iterator[Callable[[], None]]:
    """Yield a function that confines a child between ``fork`` and ``exec``; it does nothing if that is switched off.

    The function makes system calls only: whatever can fail otherwise has been done when it is called.
    """
    if confinement is None or not enabled():
        yield lambda: None
        return
    filter_ = _filter(confinement)
    ruleset: landlock.Ruleset | None = None
    if confinement.access is not None and landlock.version():
        ruleset = landlock.Ruleset(confinement.access, tcp=confinement.tcp)
    elif confinement.inside and landlock.has_scopes():
        ruleset = landlock.Ruleset(None, tcp=True)
    try:
        yield lambda: _enter(confinement, ruleset, filter_)
    finally:
        if ruleset is not None:
            ruleset.close()


def confine_this_process(confinement: Confinement) -> None:
    """Confine the calling process, unless that is switched off. Call it before there is a second thread."""
    with prepared(confinement) as enter:
        enter()


def _filter(confinement: Confinement) -> seccomp.Filter | None:
    if not seccomp.available():
        return None
    numbers = set(confinement.refused)
    if confinement.threads_only:
        numbers |= set(seccomp.PROCESSES.values())
    return seccomp.Filter(seccomp.program(numbers, threads_only=confinement.threads_only))


def _enter(
    confinement: Confinement, ruleset: landlock.Ruleset | None, filter_: seccomp.Filter | None
) -> None:
    for which, value in {**_BASE_LIMITS, **confinement.limits}.items():
        # A limit that is lower already stays: raising a hard limit would be refused.
        _, hard = resource.getrlimit(which)
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (lowest, lowest))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        ruleset.enter()
    if filter_ is not None:
        filter_.enter()
