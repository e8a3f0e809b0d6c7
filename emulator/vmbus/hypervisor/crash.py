"""Crash registers: how a guest reports a crash.

Source: docs/protocol/discovery.md#crash-registers, TLFS 2.6.

The guest stores five parameters, then writes the control register. With its ``message`` bit set, P3 and P4 are
address (GPA) and length (bytes) of a text. The parameters are latched at that write; the guest continues to run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmbus.errors import GuestAddressError
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.refusals import Refusals
from vmbus.wire.msr import CRASH_CONTROL, CRASH_PARAMETER_COUNT, CrashControl

CONTROL_CAPABILITIES = CRASH_CONTROL.build(CrashControl(message=True, notify=True))
"""CRASH_CTL as the guest reads it."""

MAX_MESSAGE = PAGE_SIZE
"""Bytes of a crash message that are read."""


@dataclass(frozen=True, slots=True)
class CrashReport:
    """A crash that the guest reported.

    ``parameters``: P0 to P4. ``message``: text without control characters other than newline and tab; None if the
    guest gave none, or one that is not in RAM.
    """

    parameters: tuple[int, ...]
    control: CrashControl
    message: str | None = None


@dataclass(slots=True)
class CrashRegisters:
    """CRASH_P0 to CRASH_P4; there is one set per partition."""

    parameters: list[int] = field(default_factory=lambda: [0] * CRASH_PARAMETER_COUNT)

    def write_control(self, value: int, memory: GuestMemory, refusals: Refusals) -> CrashReport | None:
        """Write CRASH_CTL; return the report that the guest makes, or None without the ``notify`` bit."""
        control = CRASH_CONTROL.parse(value)
        if not control.notify:
            return None
        parameters = tuple(self.parameters)
        message = None
        if control.message:
            message = _read_message(parameters[3], parameters[4], memory, refusals)
        return CrashReport(parameters, control, message)


def _read_message(gpa: int, length: int, memory: GuestMemory, refusals: Refusals) -> str | None:
    if length > MAX_MESSAGE:
        refusals.refuse("crash-message-too-long", f"{length} bytes, only {MAX_MESSAGE} are read")
        length = MAX_MESSAGE
    try:
        data = memory.read(gpa, length)
    except GuestAddressError as error:
        refusals.refuse("crash-message-not-ram", str(error))
        return None
    text = data.split(b"\0", 1)[0].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
