"""The configuration of migrations that matters to the emulator: QEMU's mode and capabilities.

guest memory     is sent      mode normal or cpr-reboot
                 stays        x-ignore-shared, or mode cpr-transfer: the target maps the same file
impossible       post-copy, release-ram, COLO, background snapshots, mode cpr-exec
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from vmbus.machine.migration.ports import Monitor

CAPABILITIES = ("events", "pause-before-switchover")
"""Capabilities that are set when the emulator attaches (docs/migration.md)."""

IMPOSSIBLE = {
    "postcopy-ram": "the guest would run before its memory has arrived, and the emulator reads that memory",
    "release-ram": "QEMU would remove pages from the memory file that the emulator maps",
    "x-colo": "the emulator's state cannot be checkpointed",
    "background-snapshot": "QEMU cannot delay the emulator's writes while it saves",
}
"""Capabilities with which the guest cannot be migrated, and why."""

IMPOSSIBLE_MODES = {
    "cpr-exec": "QEMU would be replaced by another program, and would close every socket through which the "
    "emulator serves the guest; use cpr-transfer, which does the same with a second process",
}
"""Modes in which the guest cannot be migrated, and why."""

_NORMAL = "normal"
_WITHOUT_MEMORY = ("cpr-transfer",)


@dataclass(frozen=True, slots=True)
class Configuration:
    """The configuration of the next migration. ``refusal``: why it cannot work, or empty."""

    mode: str
    memory_stays: bool
    answered: bool
    """Whether the target confirms that it has everything: QEMU's ``completed`` waits for that."""
    refusal: str

    @property
    def snapshot_refusal(self) -> str:
        """Why no snapshot can be made or loaded, or empty: QEMU's capabilities apply to snapshots too."""
        if self.refusal:
            return self.refusal
        if self.mode != _NORMAL:
            return f"mode {self.mode}: snapshots are made in mode {_NORMAL}"
        if self.memory_stays:
            return "x-ignore-shared: guest memory would not be in the snapshot"
        return ""


async def read_configuration(qmp: Monitor) -> Configuration:
    """Return QEMU's present configuration."""
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
    """Set whether migrations leave guest memory in its file, for the target to map it; both sides must agree."""
    wanted = [{"capability": "x-ignore-shared", "state": stays}]
    await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})


@contextlib.asynccontextmanager
async def cpr_transfer(qmp: Monitor) -> AsyncIterator[None]:
    """Set the mode ``cpr-transfer`` for a migration, and the mode of before afterwards."""
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
