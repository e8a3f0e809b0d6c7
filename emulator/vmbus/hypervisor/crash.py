"""Crash registers: what a guest says when it dies.

Source: docs/protocol/discovery.md#crash-registers, TLFS 2.6.

The guest stores five parameters, then writes the control register; with its ``message`` bit, P3 and P4 are
address and length of a text. Parameters are latched at that write and the guest goes on running.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmbus.errors import GuestAddressError
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.refusals import Refusals
from vmbus.wire.msr import CRASH_CONTROL, CRASH_PARAMETER_COUNT, CrashControl

CAPABILITIES = CRASH_CONTROL.build(CrashControl(message=True, notify=True))
MESSAGE_MAX = PAGE_SIZE


@dataclass(frozen=True, slots=True)
class CrashReport:
    """One report. ``message`` is decoded text without control characters but newline and tab."""

    parameters: tuple[int, ...]
    control: CrashControl
    message: str | None = None


@dataclass(slots=True)
class CrashRegisters:
    """CRASH_P0 to P4; one set a partition."""

    parameters: list[int] = field(default_factory=lambda: [0] * CRASH_PARAMETER_COUNT)

    def control_written(self, value: int, memory: GuestMemory, refusals: Refusals) -> CrashReport | None:
        """The report that a write of CRASH_CTL makes; None if it does not ask for one."""
        control = CRASH_CONTROL.parse(value)
        if not control.notify:
            return None
        parameters = tuple(self.parameters)
        message = None
        if control.message:
            message = _read_message(parameters[3], parameters[4], memory, refusals)
        return CrashReport(parameters, control, message)


def _read_message(gpa: int, length: int, memory: GuestMemory, refusals: Refusals) -> str | None:
    if length > MESSAGE_MAX:
        refusals.refuse("crash-message-too-long", f"{length} bytes, {MESSAGE_MAX} are read")
        length = MESSAGE_MAX
    try:
        data = memory.read(gpa, length)
    except GuestAddressError as error:
        refusals.refuse("crash-message-not-ram", str(error))
        return None
    text = data.split(b"\0", 1)[0].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
