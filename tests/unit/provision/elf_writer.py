"""Writes the small ELF files that the tests read: kernel modules, and dynamically linked programs."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def kernel_module(*entries: str, section: str = ".modinfo") -> bytes:
    """A relocatable file with one section of NUL-terminated ``entries`` ("depends=a,b")."""
    data = b"".join(entry.encode() + b"\0" for entry in entries)
    names = b"\0" + section.encode() + b"\0.shstrtab\0"
    data_at = 64
    names_at = data_at + len(data)
    table_at = (names_at + len(names) + 7) & ~7
    sections = [
        bytes(64),
        _section(1, 1, data_at, len(data)),
        _section(2 + len(section), 3, names_at, len(names)),
    ]
    head = _header(kind=1, section_table=table_at, sections=3, names=2)
    body = (head + data + names).ljust(table_at, b"\0")
    return body + b"".join(sections)


def program(
    *, interpreter: str = "", needed: Sequence[str] = (), run_path: str = "", machine: int = 62
) -> bytes:
    """A dynamic executable that names its interpreter and libraries, and has no code."""
    strings = b"\0"
    tags: list[tuple[int, int]] = []
    for name in needed:
        tags.append((1, len(strings)))
        strings += name.encode() + b"\0"
    if run_path:
        tags.append((29, len(strings)))
        strings += run_path.encode() + b"\0"
    path = interpreter.encode() + b"\0"
    segments_at = 64
    count = 3 if interpreter else 2
    path_at = segments_at + 56 * count
    strings_at = path_at + len(path)
    dynamic_at = (strings_at + len(strings) + 7) & ~7
    tags += [(5, strings_at), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    size = dynamic_at + len(dynamic)
    segments = _segment(1, 0, size) + _segment(2, dynamic_at, len(dynamic))
    if interpreter:
        segments += _segment(3, path_at, len(path))
    head = _header(kind=3, segment_table=segments_at, segments=count, machine=machine)
    return (head + segments + path + strings).ljust(dynamic_at, b"\0") + dynamic


def _header(
    *,
    kind: int,
    section_table: int = 0,
    sections: int = 0,
    names: int = 0,
    segment_table: int = 0,
    segments: int = 0,
    machine: int = 62,
) -> bytes:
    identification = b"\x7fELF\x02\x01\x01" + bytes(9)
    return identification + struct.pack(
        "<HHIQQQIHHHHHH",
        kind,
        machine,
        1,
        0,
        segment_table,
        section_table,
        0,
        64,
        56,
        segments,
        64,
        sections,
        names,
    )


def _section(name: int, kind: int, offset: int, size: int) -> bytes:
    return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)


def _segment(kind: int, offset: int, size: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 4, offset, offset, offset, size, size, 8)
