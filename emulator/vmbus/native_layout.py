"""C declarations of what compiled code and Python share, made from :mod:`ctypes` structures and numbers."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from ctypes import Structure
from importlib import resources
from typing import Any

DEVICE_HEADER = resources.files("vmbus").joinpath("engine_device.h").read_text()
"""``engine_device.h``, for a device whose compiled code runs in the engine: what it brings, and what it may use."""

_C_TYPES: dict[Any, str] = {
    ctypes.c_char: "char",
    ctypes.c_uint8: "uint8_t",
    ctypes.c_int32: "int32_t",
    ctypes.c_uint32: "uint32_t",
    ctypes.c_int64: "int64_t",
    ctypes.c_uint64: "uint64_t",
    ctypes.c_void_p: "uint8_t *",
}


def constants(values: Mapping[str, int]) -> str:
    """Return ``#define`` lines."""
    return "\n".join([f"#define {name} {int(value)}" for name, value in values.items()])


def declarations(structures: Sequence[type[Structure]]) -> str:
    """Return ``structures`` in C, in this order, with assertions about every size and offset."""
    return "\n".join([_declare(each) for each in structures])


def c_name(structure: type[Structure]) -> str:
    """Return the name in C: ``EngineSetup`` is ``engine_setup``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", structure.__name__).lower()


def _declare(structure: type[Structure]) -> str:
    name = c_name(structure)
    lines = [f"struct {name} {{"]
    checks = [f'_Static_assert(sizeof(struct {name}) == {ctypes.sizeof(structure)}, "size");']
    for field, declared, *_ in structure._fields_:
        kind: Any = declared
        count = ""
        if issubclass(kind, ctypes.Array):
            count, kind = f"[{kind._length_}]", kind._type_
        c_type = f"struct {c_name(kind)}" if issubclass(kind, Structure) else _C_TYPES[kind]
        lines.append(f"    {c_type}{'' if c_type.endswith('*') else ' '}{field}{count};")
        place, size = getattr(structure, field).offset, ctypes.sizeof(declared)
        checks.append(
            f"_Static_assert(offsetof(struct {name}, {field}) == {place} && "
            f'sizeof(((struct {name} *)0)->{field}) == {size}, "{field}");'
        )
    return "\n".join([*lines, "};", *checks, ""])
