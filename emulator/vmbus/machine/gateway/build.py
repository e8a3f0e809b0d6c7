"""Compiles the trap gateway (:mod:`vmbus.native`)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vmbus.native import NativeLibrary

SOURCE = Path(__file__).with_name("plugin")
LIBRARY = NativeLibrary("vmbus-gateway", "the trap gateway", resources.files(__package__).joinpath("plugin"))


def library_path(cache: Path | None = None) -> Path:
    """Return the path of the library of this version, compiled or not."""
    return LIBRARY.path(cache)


def build(cache: Path | None = None) -> Path:
    """Return the path of the compiled plug-in, for QEMU's ``-plugin``. Raises as :meth:`NativeLibrary.build`."""
    return LIBRARY.build(cache)
