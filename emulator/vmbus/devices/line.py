"""The text of ``--device``, in QEMU's form: a name, then keys with values; a comma in a value is written twice."""

from __future__ import annotations

from collections.abc import Mapping

from vmbus.errors import UsageError


def split_device(text: str) -> tuple[str, dict[str, str]]:
    """Return ``("echo", {"id": "a,b"})`` for ``"echo,id=a,,b"``. Raises :class:`~vmbus.errors.UsageError`."""
    words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
    name, *pairs = words
    if not name:
        raise UsageError(f"--device {text}: a device name comes first")
    values: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not key or not separator:
            raise UsageError(
                f"--device {text}: {pair!r} is not key=value (a comma inside a value is written ,,)"
            )
        if key in values:
            raise UsageError(f"--device {text}: {key} is given twice")
        values[key] = value
    return name, values


def join_device(name: str, values: Mapping[str, str]) -> str:
    """Return the text that :func:`split_device` takes apart."""
    return ",".join([name, *(f"{key}={value}".replace(",", ",,") for key, value in values.items())])
