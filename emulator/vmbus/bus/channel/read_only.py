"""Guest pages that a device maps for reading only (VmbChannelMapGpadl with READ_ONLY).

A page that the host never writes need not be sent again by a migration, so a device that means to read says so, and
a write by mistake is an error instead of a page that becomes dirty.
"""

from __future__ import annotations

from vmbus.errors import DeviceError
from vmbus.ports import GuestPages


class ReadOnlyPages:
    """``pages``, whose writes raise :class:`~vmbus.errors.DeviceError`."""

    def __init__(self, pages: GuestPages) -> None:
        self._pages = pages

    @property
    def size(self) -> int:
        return self._pages.size

    def read(self, offset: int, length: int) -> bytes:
        return self._pages.read(offset, length)

    def load_u32(self, offset: int) -> int:
        return self._pages.load_u32(offset)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        raise _refused(len(data), offset)

    def store_u32(self, offset: int, value: int) -> None:
        raise _refused(4, offset)

    def set_bits_u32(self, offset: int, bits: int) -> int:
        raise _refused(4, offset)

    def address_u32(self, offset: int) -> int:
        return 0  # compiled code could write there


def _refused(length: int, offset: int) -> DeviceError:
    return DeviceError(
        f"{length} bytes cannot be written at {offset:#x}: the device mapped these pages with read_only=True"
    )
