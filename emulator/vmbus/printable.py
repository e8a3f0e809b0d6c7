"""Text of guests, servers, mirrors and peers as a terminal may show it: the one filter for all that is printed."""

from __future__ import annotations


def harmless(text: str, keep: str = "\n\t") -> str:
    r"""Return ``text`` with ``\x1b`` and the like in place of what a terminal would execute; ``keep`` stays.

    Replaced are control characters of ASCII and Unicode, those that change the direction of text, and lone
    surrogates.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def one_line(text: str) -> str:
    r"""As :func:`harmless`, for text that could pretend to be more lines: a newline is shown as ``\n``."""
    return harmless(text, keep="")


def indented(text: str) -> str:
    """As :func:`harmless`; lines after the first are indented, so that none of them looks like a message itself."""
    return harmless(text).rstrip("\n").replace("\n", "\n  ")
