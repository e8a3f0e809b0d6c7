"""A process without descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_descriptors(left: int = 0) -> Iterator[None]:
    """Let this process open only ``left`` more descriptors in the block."""
    held = [os.dup(0) for _ in range(left)]
    lowest = os.dup(0)
    for number in (*held, lowest):
        os.close(number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
