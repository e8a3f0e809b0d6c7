"""The compiled library of this folder, seen from Python.

The functions are called without releasing the interpreter's lock: they take less time than that would.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence

from vmbus.errors import InternalError, MissingRequirement
from vmbus.machine.engine.build import LIBRARY

_logger = logging.getLogger(__name__)

SetBits = Callable[[int, int], int]
"""``set_bits(address of a 32-bit word, bits)`` → the word from before; atomic, and a full fence."""


class _VcpuSignals(ctypes.Structure):
    _fields_ = [("idle", ctypes.c_void_p), ("pending", ctypes.c_void_p), ("missed", ctypes.c_void_p)]


class EngineLibrary:
    """The functions of ``signals.h``. Made by :meth:`open`."""

    def __init__(self, path: str) -> None:
        library = ctypes.PyDLL(path)
        set_bits = library.signals_set_bits
        set_bits.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        set_bits.restype = ctypes.c_uint32
        self.set_bits: SetBits = set_bits
        self.post = library.signals_post
        self.post.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        self.post.restype = ctypes.c_uint32
        self.take_back = library.signals_take_back
        self.take_back.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        self.take_back.restype = ctypes.c_uint32

    @classmethod
    def open(cls) -> EngineLibrary | None:
        """Return the library, compiled if need be; ``None`` where that is not possible, for the reason in the log."""
        try:
            return cls(str(LIBRARY.build()))
        except (MissingRequirement, InternalError, OSError) as error:
            _logger.warning(
                "every interrupt goes through QEMU's main loop, which is slower: the compiled part of the emulator "
                "is missing: %s",
                error,
            )
            return None


class VcpuSignals:
    """The vCPUs' words in the memory that the gateway shares; see ``signals.h``.

    ``addresses``: for each vCPU the addresses in this process of ``idle``, ``pending`` and ``missed``.
    """

    def __init__(self, library: EngineLibrary, addresses: Sequence[tuple[int, int, int]]) -> None:
        self._post = library.post
        self._take_back = library.take_back
        self._words = (_VcpuSignals * len(addresses))(*[_VcpuSignals(*each) for each in addresses])
        self._at = [ctypes.addressof(each) for each in self._words]

    def post(self, vcpu: int, vector: int) -> bool:
        """Leave an interrupt to a vCPU that polls; False: raise it through QEMU."""
        return vcpu < len(self._at) and bool(self._post(self._at[vcpu], vector))

    def take_back(self, vcpu: int, vector: int) -> bool:
        """Withdraw an interrupt that was left to a vCPU; False if it was taken since."""
        return vcpu < len(self._at) and bool(self._take_back(self._at[vcpu], vector))
