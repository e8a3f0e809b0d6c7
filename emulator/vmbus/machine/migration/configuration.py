"""What a migration is set up to do, as far as it matters to the emulator: QEMU's mode and capabilities.

guest memory     is sent      mode normal or cpr-reboot
                 stays        x-ignore-shared, or mode cpr-transfer: the target maps the same file
nothing goes     post-copy, release-ram, COLO, background snapshots, mode cpr-exec
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from vmbus.machine.migration.ports import Monitor

CAPABILITIES = ("events", "pause-before-switchover")
"""Set when the emulator attaches: docs/migration.md says what for."""

IMPOSSIBLE = {
    "postcopy-ram": "the guest would run before its memory is there, and the emulator reads that memory",
    "release-ram": "pages would be taken from the memory file that the emulator maps",
    "x-colo": "the emulator's state cannot be checkpointed",
    "background-snapshot": "QEMU cannot hold back the emulator's writes while it saves",
}
"""Capabilities with which nothing is let through."""

IMPOSSIBLE_MODES = {
    "cpr-exec": "QEMU would become another program, and close every socket that the emulator serves the guest "
    "through; cpr-transfer does the same with a second process",
}
"""Modes in which nothing is let through."""

_NORMAL = "normal"
_WITHOUT_MEMORY = ("cpr-transfer",)


@dataclass(frozen=True, slots=True)
class Configuration:
    """How the next migration goes. ``refusal``: why it cannot, or empty."""

    mode: str
    memory_stays: bool
    answered: bool
    """The target says when it has everything: QEMU's ``completed`` waits for that."""
    refusal: str

    @property
    def snapshot_refusal(self) -> str:
        """Why no snapshot can be made or loaded with what is set, or empty: QEMU would leave out memory there too."""
        if self.refusal:
            return self.refusal
        if self.mode != _NORMAL:
            return f"mode {self.mode}: snapshots are made in mode {_NORMAL}"
        if self.memory_stays:
            return "x-ignore-shared: guest memory would not be in the snapshot"
        return ""


async def read_configuration(qmp: Monitor) -> Configuration:
    """What QEMU is set up for now."""
    capabilities = await qmp.execute("query-migrate-capabilities")
    parameters = await qmp.execute("query-migrate-parameters")
    on = {str(each["capability"]) for each in capabilities if each["state"]}
    mode = str(parameters.get("mode", _NORMAL))
    return Configuration(
        mode=mode,
        memory_stays="x-ignore-shared" in on or mode in _WITHOUT_MEMORY,
        answered="return-path" in on,
        refusal=_refusal(on, mode),
    )


async def leave_memory(qmp: Monitor, stays: bool) -> None:
    """Whether migrations leave guest memory in its file, for the target to map it; both sides must agree."""
    wanted = [{"capability": "x-ignore-shared", "state": stays}]
    await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})


@contextlib.asynccontextmanager
async def cpr_transfer(qmp: Monitor) -> AsyncIterator[None]:
    """A migration in the mode ``cpr-transfer``; the mode is what it was afterwards."""
    before = (await qmp.execute("query-migrate-parameters")).get("mode", _NORMAL)
    await qmp.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
    try:
        yield
    finally:
        if qmp.connected:
            await qmp.execute("migrate-set-parameters", {"mode": before})


def _refusal(on: set[str], mode: str) -> str:
    for capability, why in IMPOSSIBLE.items():
        if capability in on:
            return f"{capability}: {why}"
    if mode in IMPOSSIBLE_MODES:
        return f"mode {mode}: {IMPOSSIBLE_MODES[mode]}"
    return ""
