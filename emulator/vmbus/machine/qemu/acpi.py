"""The ACPI table by which a guest finds the VMBus: ``_HID "VMBus"`` in a module device with memory windows.

``qemu-config/vmbus.asl`` is the source of the table and ``qemu-config/vmbus.aml`` the result of :func:`vmbus_table`;
tests check that the three agree. The hardware id has five characters, which ``iasl`` reports as an error (compile
with ``-f``) and every guest accepts. The device's own ``_CRS`` must exist and may be empty; an ancestor must have a
memory window, because some guests walk up until they find one (docs/protocol/discovery.md#acpi-device).
"""

from __future__ import annotations

from collections.abc import Sequence

LOW_WINDOW = (0xFEF0_0000, 0x8_0000)
"""Address and size, in bytes, of the memory window below 4 GiB: between QEMU's devices and the KVM pages."""
HIGH_WINDOW = (0xD0_0000_0000, 0x1_0000_0000)
"""The one above: beyond RAM and 64-bit PCI windows, and below 1 TiB, which is all that TCG's processors address."""

_SCOPE = b"\x10"
_NAME = b"\x08"
_DEVICE = b"\x5b\x82"
_BUFFER = b"\x11"
_BYTE = b"\x0a"
_STRING = b"\x0d"
_ZERO = b"\x00"
_END_TAG = b"\x79\x00"


def _package(opcode: bytes, content: bytes) -> bytes:
    """Return an AML object with its package length: one byte up to 63, else two (ACPI 20.2.4)."""
    length = len(content) + 1
    if length <= 0x3F:
        return opcode + bytes([length]) + content
    length += 1
    return opcode + bytes([0x40 | length & 0xF, length >> 4]) + content


def _name(segment: str, value: bytes) -> bytes:
    return _NAME + segment.encode("ascii") + value


def _string(text: str) -> bytes:
    return _STRING + text.encode("ascii") + b"\0"


def _window(tag: int, width: int, window: tuple[int, int]) -> bytes:
    """Return an address space descriptor of memory that this device produces (ACPI 6.4.3.5)."""
    start, size = window
    memory, produced_and_fixed, writable = 0, 0x0C, 1
    values = (0, start, start + size - 1, 0, size)
    content = bytes([memory, produced_and_fixed, writable]) + b"".join(
        value.to_bytes(width, "little") for value in values
    )
    return bytes([tag]) + len(content).to_bytes(2, "little") + content


def _resources(descriptors: Sequence[bytes] = ()) -> bytes:
    template = b"".join(descriptors) + _END_TAG
    return _package(_BUFFER, _BYTE + bytes([len(template)]) + template)


def vmbus_table() -> bytes:
    """Return the SSDT with header and checksum."""
    bus = _package(
        _DEVICE,
        b"VMBS"
        + _name("_HID", _string("VMBus"))
        + _name("_UID", _ZERO)
        + _name("_DDN", _string("VMBUS"))
        + _name("_STA", _BYTE + b"\x0f")
        + _name("_CRS", _resources()),
    )
    module = _package(
        _DEVICE,
        b"VMOD"
        + _name("_HID", _string("ACPI0004"))
        + _name("_UID", _ZERO)
        + _name("_CRS", _resources((_window(0x87, 4, LOW_WINDOW), _window(0x8A, 8, HIGH_WINDOW))))
        + bus,
    )
    body = _package(_SCOPE, b"\\_SB_" + module)
    length = 36 + len(body)
    table = bytearray(
        b"SSDT"
        + length.to_bytes(4, "little")
        + b"\x02\x00"  # revision 2, checksum to come
        + b"VMBHST"
        + b"VMBUSDEV"
        + (2).to_bytes(4, "little")
        + b"INTL"
        + (0x20200925).to_bytes(4, "little")
        + body
    )
    table[9] = -sum(table) & 0xFF
    return bytes(table)
