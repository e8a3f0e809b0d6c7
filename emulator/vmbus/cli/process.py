"""What a command changes of its process, and what is put back at its end.

A process may execute several commands: a test does, and so may a program that calls ``vmbus.cli.main``. What cannot
be put back are the restrictions of the sandbox, which a process keeps for its life.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

from vmbus.sandbox import confinement


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put back at the end of the block: the bound on memory, and whether children are confined."""
    confines = confinement.enabled()
    before, _ = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        yield
    finally:
        confinement.enable(confines)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
