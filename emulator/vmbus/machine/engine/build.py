"""Compiles this folder (:mod:`vmbus.native`)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vmbus.machine.engine.layout import header
from vmbus.native import FLAGS, NativeLibrary
from vmbus.native_layout import DEVICE_HEADER

SOURCE = Path(__file__).parent
LIBRARY = NativeLibrary(
    "vmbus-engine",
    "the engine",
    resources.files(__package__),
    flags=(*FLAGS, "-D_GNU_SOURCE"),
    generated={"layout.h": header(), "engine_device.h": DEVICE_HEADER},
)
