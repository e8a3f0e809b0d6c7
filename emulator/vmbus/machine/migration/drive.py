"""Drives QEMU through a migration or a snapshot, and tells what it took.

The choreography of the emulator's own part is :mod:`vmbus.machine.migration.coordinator`, which works the same
when somebody else drives.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmbus.errors import QemuError, UserError
from vmbus.machine.migration.addresses import handed_over, structured, two_way
from vmbus.machine.migration.configuration import CAPABILITIES, cpr_transfer, read_configuration
from vmbus.machine.migration.coordinator import Phase
from vmbus.machine.migration.report import ENDED, Report
from vmbus.machine.migration.side_channel import CarrierAddress

if TYPE_CHECKING:
    from vmbus.machine.host import Host

_POLL = 0.05
_ARRIVAL_POLL = 0.25
_EVENT_LIMIT = 10.0
_SETUP_LIMIT = 5.0


class MigrationFailed(UserError):
    """The guest goes on where it was; the message says why it could not leave."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A migration that succeeded. Times in seconds, from QEMU's own account."""

    total: float
    downtime: float
    memory_bytes: int
    passes: int
    report: Report

    def as_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {
            "total": self.total,
            "downtime": self.downtime,
            "memory_bytes": self.memory_bytes,
            "passes": self.passes,
            **self.report.as_dict(),
        }


Progress = Callable[[dict[str, Any]], object]
"""Called with QEMU's ``query-migrate`` now and then."""


async def migrate(
    host: Host,
    uri: str,
    *,
    cpr: str | None = None,
    descriptor: int | None = None,
    carrier: CarrierAddress | None = None,
    progress: Progress | None = None,
    limit: float = 600.0,
) -> Outcome:
    """Send the guest of ``host`` to ``uri``; returns when the target has it.

    ``cpr``: where a QEMU waits for the descriptors of guest memory and more (``unix:PATH``, its ``-incoming`` of
    channel type ``cpr``); then nothing is copied. ``descriptor``: what ``fd:`` names, of this process.

    ``carrier``: how the emulator's state goes, if not in QEMU's stream.

    Raises :class:`MigrationFailed` when it stays here: refused, failed, cancelled, or not done in ``limit``
    seconds.
    """
    coordinator = host.migration
    if host.facts.dbus_address is None and carrier is None:
        raise MigrationFailed(
            "this QEMU runs without -object dbus-vmstate, which carries the emulator's state: "
            "`vmbus qemu-args --migratable` prints the options; or let the emulators do it, with --carrier"
        )
    if coordinator.phase is not Phase.IDLE:
        raise MigrationFailed(f"the guest cannot be migrated now: it is {coordinator.phase.value}")
    qmp = host.qmp
    if refusal := (await read_configuration(qmp)).refusal:
        raise MigrationFailed(f"{refusal}; the guest goes on here")
    wanted = {**dict.fromkeys(CAPABILITIES, True), "return-path": two_way(uri, descriptor)}
    await qmp.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": state} for name, state in wanted.items()]},
    )
    coordinator.report = Report()
    async with contextlib.AsyncExitStack() as stack:
        try:
            if carrier is not None:
                await stack.enter_async_context(coordinator.side_channel.carrying(carrier))
            address = await stack.enter_async_context(handed_over(qmp, uri, descriptor))
            if cpr is not None:
                await stack.enter_async_context(cpr_transfer(qmp))
                channels = [("main", address), ("cpr", cpr)]
                arguments: dict[str, Any] = {
                    "channels": [
                        {"channel-type": kind, "addr": structured(where)} for kind, where in channels
                    ]
                }
            else:
                arguments = {"uri": address}
            host.memory.take_dirty()  # QEMU begins with all of memory
            coordinator.early.begin()
            await qmp.execute("migrate", arguments)
        except QemuError as error:
            coordinator.early.end()
            raise MigrationFailed(str(error)) from error
        found = await _followed(host, progress, limit)
    if found["status"] != "completed":
        # Of one that was cancelled QEMU describes what the end of its connection looked like.
        described = None if found["status"] == "cancelled" else found.get("error-desc")
        why = coordinator.report.refusal or described or f"it was {found['status']}"
        raise MigrationFailed(f"{why}; the guest goes on here")
    ram = found.get("ram", {})
    return Outcome(
        total=found.get("total-time", 0) / 1000,
        downtime=found.get("downtime", 0) / 1000,
        memory_bytes=ram.get("transferred", 0),
        passes=ram.get("dirty-sync-count", 0),
        report=coordinator.report,
    )


async def _followed(host: Host, progress: Progress | None, limit: float) -> dict[str, Any]:
    """QEMU's account of the migration that has begun, once it has ended; after ``limit`` seconds it is cancelled."""
    try:
        async with asyncio.timeout(limit):
            return await _ended(host, progress)
    except TimeoutError:
        coordinator = host.migration
        with contextlib.suppress(TimeoutError):  # in ``setup`` a cancel may hang QEMU, but it may be for ever
            await coordinator.until(lambda: coordinator.report.status != "setup", _SETUP_LIMIT)
        with contextlib.suppress(QemuError):
            await host.qmp.execute("migrate_cancel")
        await _ended(host, None)
        raise MigrationFailed(f"not done within {limit:g} s; the guest goes on here") from None


async def _ended(host: Host, progress: Progress | None) -> dict[str, Any]:
    """Wait for the end of a migration."""
    coordinator = host.migration
    while True:
        found: dict[str, Any] = await host.qmp.execute("query-migrate")
        status = str(found.get("status"))
        if progress is not None:
            progress(found)
        if status in ENDED:
            # The answer may overtake the event, and only that ends the follower's part.
            with contextlib.suppress(TimeoutError):
                await coordinator.until(lambda: coordinator.report.ended, _EVENT_LIMIT)
            return found
        with contextlib.suppress(TimeoutError):  # between them it stands still, and QEMU has better to do
            await coordinator.until(lambda: coordinator.report.ended, _POLL)


async def receive(
    host: Host, uri: str, *, descriptor: int | None = None, carrier: CarrierAddress | None = None
) -> None:
    """Listen on ``uri`` for the guest; returns when QEMU listens. See :func:`arrived`.

    ``descriptor``: what ``fd:`` names, of this process. ``carrier``: how the emulator's state comes, if not in QEMU's
    stream.
    """
    if carrier is not None:
        await host.migration.listen(carrier)
    async with handed_over(host.qmp, uri, descriptor) as address:
        await host.qmp.execute("migrate-incoming", {"uri": address, "exit-on-error": False})


async def arrived(host: Host, limit: float | None = 600.0) -> None:
    """Wait until the guest is here: it runs, or is stopped as it was before; with no ``limit``, for ever.

    Raises :class:`MigrationFailed` if it did not come.
    """
    coordinator = host.migration
    async with asyncio.timeout(limit):
        while coordinator.phase in (Phase.INCOMING, Phase.LOADED):
            found = await host.qmp.execute("query-migrate")
            if found.get("status") == "failed":
                raise MigrationFailed(
                    coordinator.load_refused or found.get("error-desc", "the migration failed")
                )
            if found.get("status") == "completed" and coordinator.phase is Phase.LOADED:
                state = await host.qmp.execute("query-status")
                if state["status"] == "paused":
                    return
            with contextlib.suppress(TimeoutError):
                await coordinator.until(lambda: coordinator.phase is Phase.IDLE, _ARRIVAL_POLL)
    if coordinator.phase is Phase.LOST:
        raise MigrationFailed(coordinator.load_refused)
