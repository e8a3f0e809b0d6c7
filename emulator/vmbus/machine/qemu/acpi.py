"""The ACPI table by which a guest finds the VMBus: one device with ``_HID "VMBus"`` under ``\\_SB``.

``qemu-config/vmbus.asl`` is the source of the table and ``qemu-config/vmbus.aml`` the result of :func:`vmbus_table`;
tests check that the three agree. The hardware id has five characters, which ``iasl`` reports as an error (compile
with ``-f``) and every guest accepts. ``_CRS`` must exist and may be empty
(docs/protocol/discovery.md#acpi-device).
"""

from __future__ import annotations

_SCOPE = b"\x10"
_NAME = b"\x08"
_DEVICE = b"\x5b\x82"
_BUFFER = b"\x11"
_BYTE = b"\x0a"
_STRING = b"\x0d"
_ZERO = b"\x00"
_END_TAG = b"\x79\x00"


def _package(opcode: bytes, content: bytes) -> bytes:
    """Return an AML object with a package length of one byte."""
    length = len(content) + 1
    if length > 0x3F:
        raise ValueError(f"{length} bytes need a longer package length")
    return opcode + bytes([length]) + content


def _name(segment: str, value: bytes) -> bytes:
    return _NAME + segment.encode("ascii") + value


def _string(text: str) -> bytes:
    return _STRING + text.encode("ascii") + b"\0"


def vmbus_table() -> bytes:
    """Return the SSDT with header and checksum."""
    resources = _package(_BUFFER, _BYTE + bytes([len(_END_TAG)]) + _END_TAG)
    device = _package(
        _DEVICE,
        b"VMBS"
        + _name("_HID", _string("VMBus"))
        + _name("_UID", _ZERO)
        + _name("_DDN", _string("VMBUS"))
        + _name("_STA", _BYTE + b"\x0f")
        + _name("_CRS", resources),
    )
    body = _package(_SCOPE, b"\\_SB_" + device)
    length = 36 + len(body)
    table = bytearray(
        b"SSDT"
        + length.to_bytes(4, "little")
        + b"\x02\x00"  # revision 2, checksum to come
        + b"VMBHST"
        + b"VMBUSDEV"
        + (1).to_bytes(4, "little")
        + b"INTL"
        + (0x20200925).to_bytes(4, "little")
        + body
    )
    table[9] = -sum(table) & 0xFF
    return bytes(table)
