"""Optional fields behind a record: what a later release adds, and a release that does not know it may leave out.

Source: docs/saved-state.md#optional-fields; the layout is this project's own. Behind the fields that every release
has, a record may have any number of these, in ascending order of their numbers:

    | size   | field                                                                                      |
    | varint | number of the field (from 1) * 2, plus 1 if a reader that does not know it must refuse all |
    | varint | length of the value in bytes                                                               |
    | n      | value                                                                                      |

A field with its default value is not written: a record without optional values has the bytes that it had before the
fields were added, so that every earlier release reads it. Only records whose length is known can have such fields:
those of chunks, of the hypervisor and the bus section, and of devices; not records within others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import construct as c

from vmbus.errors import MalformedError, TooNewError
from vmbus.wire.plain import append_varint, decode_varint

_MAX_NUMBER = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class OptionalField:
    """The declaration of one optional field.

    ``number``: never used for anything else. ``name``: of the dataclass's field, whose default means that it is not
    there. ``codec``: a ``construct`` declaration, of all bytes of the value. ``required``: whether a reader that does
    not know the field has to refuse the record.
    """

    number: int
    name: str
    codec: Any
    required: bool = False

    @property
    def key(self) -> int:
        """Number and flag as they are written."""
        return self.number << 1 | self.required


def build_fields(fields: Iterable[OptionalField], value: object, defaults: Mapping[str, Any]) -> bytes:
    """Return the bytes of those fields of ``value`` that differ from their ``defaults``."""
    built = bytearray()
    for field in sorted(fields, key=lambda field: field.number):
        content = getattr(value, field.name)
        if content != defaults[field.name]:
            raw = field.codec.build(content)
            append_varint(built, field.key)
            append_varint(built, len(raw))
            built += raw
    return bytes(built)


def parse_fields(
    fields: Iterable[OptionalField], data: bytes, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the values in ``data`` by name, and the numbers of the fields that are not known and may be ignored.

    Raises :class:`~vmbus.errors.MalformedError` for bytes that are not such fields, or not in their one form, and
    :class:`~vmbus.errors.TooNewError` for a field that is not known and must not be ignored.
    """
    known = {field.number: field for field in fields}
    found: dict[str, Any] = {}
    ignored: list[int] = []
    at = last = 0
    while at < len(data):
        try:
            key, at = decode_varint(data, at)
            size, at = decode_varint(data, at)
        except (IndexError, c.ConstructError) as error:
            raise MalformedError("malformed", f"an optional field is damaged: {error}") from error
        number, end = key >> 1, at + size
        if not last < number <= _MAX_NUMBER or end > len(data):
            raise MalformedError("malformed", f"optional field {number} of {size} bytes after field {last}")
        field = known.get(number)
        if field is not None:
            found[field.name] = _value(field, key, data[at:end], defaults)
        elif key & 1:
            raise TooNewError(
                "too-new", f"field {number} is not known to this release, and must not be ignored"
            )
        else:
            ignored.append(number)
        at, last = end, number
    return found, tuple(ignored)


def _value(field: OptionalField, key: int, raw: bytes, defaults: Mapping[str, Any]) -> Any:
    try:
        value = field.codec.parse(raw)
        fine = key == field.key and field.codec.build(value) == raw
    except (c.ConstructError, OverflowError) as error:
        raise MalformedError("malformed", f"{field.name} is damaged: {error}") from error
    if not fine or value == defaults[field.name]:
        raise MalformedError("malformed", f"{field.name} is not in its one form")
    return value
