"""A migration that an emulator left behind is cancelled by the next one, when QEMU can be cancelled."""

from __future__ import annotations

from typing import cast

import pytest
from vmbus.errors import QemuError
from vmbus.machine import takeover
from vmbus.machine.qemu.qmp import Qmp


class Migrating:
    """A QEMU whose migration has ``statuses``, one after the other, until it is cancelled; the last one stays."""

    def __init__(self, *statuses: str, obeys: bool = True) -> None:
        self.statuses = list(statuses)
        self.obeys = obeys
        self.cancelled_at: list[str] = []

    async def execute(self, command: str) -> dict[str, object]:
        if command == "query-status":
            return {"status": "running"}
        if command == "migrate_cancel":
            self.cancelled_at.append(self.statuses[0])
            if self.obeys:
                self.statuses = ["cancelling", "cancelled"]
            return {}
        status = self.statuses[0]
        if len(self.statuses) > 1:
            del self.statuses[0]
        return {"status": status}


async def end_migration(qemu: Migrating) -> bool:
    return await takeover.end_migration(cast("Qmp", qemu))


async def test_a_migration_is_not_cancelled_before_qemu_is_connected() -> None:
    """Cancelled in ``setup``, QEMU may wait for the target with its main loop blocked."""
    qemu = Migrating("setup", "setup", "setup", "active")
    assert await end_migration(qemu)
    assert qemu.cancelled_at == ["active"]
    assert not await end_migration(Migrating("completed"))


async def test_a_setup_that_does_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "_SETUP_TIMEOUT", 0.05)
    qemu = Migrating("setup")
    assert await end_migration(qemu)
    assert qemu.cancelled_at == ["setup"]


async def test_a_migration_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "_TIMEOUT", 0.05)
    qemu = Migrating("pre-switchover", obeys=False)
    with pytest.raises(QemuError, match="has not ended the migration of this guest"):
        await end_migration(qemu)
    assert len(qemu.cancelled_at) == 1
