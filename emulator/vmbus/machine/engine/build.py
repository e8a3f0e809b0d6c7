"""Compiles this folder (:mod:`vmbus.native`)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vmbus.native import NativeLibrary

SOURCE = Path(__file__).parent
LIBRARY = NativeLibrary("vmbus-engine", "the engine", resources.files(__package__))
