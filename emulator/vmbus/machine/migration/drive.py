"""Makes QEMU migrate the guest, or receive one, and returns what it took.

The emulator's own part is done by :mod:`vmbus.machine.migration.coordinator`, in the same way if another program
drives QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbus.errors import QemuError, UserError
from vmbus.machine.migration import refused
from vmbus.machine.migration.addresses import structured, two_way
from vmbus.machine.migration.configuration import CAPABILITIES, cpr_transfer, read_configuration
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.opened import handed_over
from vmbus.machine.migration.report import ENDED, Report
from vmbus.machine.migration.side_channel import CarrierAddress
from vmbus.machine.migration.state_machine import Phase

_POLL = 0.05
"""Seconds between two ``query-migrate`` at the source."""
_ARRIVAL_POLL = 0.25
"""Seconds between two ``query-migrate`` at the target."""
_EVENT_TIMEOUT = 10.0
"""Seconds for an event that QEMU has sent."""
_SETUP_TIMEOUT = 5.0
"""Seconds to wait for the end of ``setup`` before a migration is cancelled."""


class MigrationFailed(UserError):
    """A migration that failed: the guest continues where it was; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A migration that succeeded. Times in seconds, as QEMU reports them."""

    total: float
    downtime: float
    memory_bytes: int
    passes: int
    report: Report

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "total": self.total,
            "downtime": self.downtime,
            "memory_bytes": self.memory_bytes,
            "passes": self.passes,
            **self.report.as_dict(),
        }


Progress = Callable[[dict[str, Any]], object]
"""Called with the result of QEMU's ``query-migrate`` now and then."""

_REASON_TIMEOUT = 2.0
"""Seconds for a target on this machine to leave its reason: it asks its QEMU first."""
_TARGET_FAILED = "Sibling indicated error"
"""What QEMU's return path says of a target that failed: a number, and no reason."""


def described_error(found: Mapping[str, Any]) -> str | None:
    """Return the reason in QEMU's ``query-migrate``; for one that only the target knows, where it can be read."""
    text: str | None = found.get("error-desc")
    if text is not None and _TARGET_FAILED in text:
        return (
            "the target refused the guest, and QEMU passes no reason back: read it at the target, in the last lines "
            "of its `vmbus run --incoming`, or of `vmbus attach` and its QEMU"
        )
    return text


async def _reason(found: Mapping[str, Any], addresses: Sequence[str], begun: float) -> str | None:
    """Return why a migration failed that began at ``begun``: in the target's own words if it left them here.

    ``addresses``: by which the target may know this migration.
    """
    end = time.monotonic() + (_REASON_TIMEOUT if _TARGET_FAILED in found.get("error-desc", "") else 0)
    while (reason := refused.take_any(addresses, begun)) is None and time.monotonic() < end:  # noqa: ASYNC110 - a file
        await asyncio.sleep(_POLL)
    return f"the target refused the guest: {reason}" if reason is not None else described_error(found)


async def _forget_reasons(coordinator: Coordinator, addresses: Sequence[str], begun: float) -> None:
    """Remove what a target on this machine says about the end of a migration that failed here, or was cancelled."""
    report, end = coordinator.report, time.monotonic() + _REASON_TIMEOUT
    while coordinator.report is report and time.monotonic() < end:
        refused.take_any(addresses, begun)
        await asyncio.sleep(_POLL)


async def migrate(
    coordinator: Coordinator,
    uri: str,
    *,
    cpr: str | None = None,
    descriptor: int | None = None,
    carrier: CarrierAddress | None = None,
    directory: Path | None = None,
    progress: Progress | None = None,
    timeout: float = 600.0,
) -> Outcome:
    """Send the guest of ``coordinator`` to ``uri``; return when the target has it.

    ``cpr``: address of a QEMU that waits for the descriptors of guest memory and more (``unix:PATH``, its
    ``-incoming`` of channel type ``cpr``); then nothing is copied. ``descriptor``: the descriptor of this process
    that ``fd:`` names. ``carrier``: side channel for the emulator's state, if QEMU's stream does not carry it.
    ``directory``: where the command of ``exec:`` is started.

    Raises :class:`MigrationFailed` when the guest stays here: the migration was refused, failed, was cancelled, or
    did not end within ``timeout`` seconds.
    """
    ports = coordinator.ports
    if ports.dbus_address is None and carrier is None:
        raise MigrationFailed(
            "this QEMU runs without -object dbus-vmstate, which carries the emulator's state: "
            "`vmbus qemu-args --migratable` prints the options; or transfer the state over a side channel, with "
            "--carrier"
        )
    if coordinator.phase is not Phase.IDLE:
        raise MigrationFailed(f"the guest cannot be migrated now: it is {coordinator.phase.value}")
    coordinator.report = Report()
    begun = time.time()
    qmp = ports.qmp
    addresses = [uri, *await refused.of_machine(qmp)]
    if descriptor is not None:
        addresses += refused.of_descriptor(descriptor)
    if refusal := (await read_configuration(qmp)).refusal:
        raise MigrationFailed(f"{refusal}; the guest continues here")
    wanted = {**dict.fromkeys(CAPABILITIES, True), "return-path": two_way(uri, descriptor)}
    await qmp.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": state} for name, state in wanted.items()]},
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            if carrier is not None:
                await stack.enter_async_context(coordinator.side_channel.carrying(carrier))
            address = await stack.enter_async_context(handed_over(qmp, uri, descriptor, directory=directory))
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
            ports.memory.take_dirty()  # QEMU begins with all of memory
            coordinator.tracker.begin()
            await qmp.execute("migrate", arguments)
        except QemuError as error:
            coordinator.tracker.end()
            raise MigrationFailed(str(error)) from error
        found = await _wait_ended(coordinator, progress, timeout)
        if found["status"] != "completed":
            # For a cancelled migration QEMU describes how the end of its connection looked.
            described = None if found["status"] == "cancelled" else await _reason(found, addresses, begun)
            why = coordinator.report.refusal or described or f"it was {found['status']}"
            ports.service.background(_forget_reasons(coordinator, addresses, begun))
            raise MigrationFailed(f"{why}; the guest continues here")
    ram = found.get("ram", {})
    return Outcome(
        total=found.get("total-time", 0) / 1000,
        downtime=found.get("downtime", 0) / 1000,
        memory_bytes=ram.get("transferred", 0),
        passes=ram.get("dirty-sync-count", 0),
        report=coordinator.report,
    )


async def _wait_ended(coordinator: Coordinator, progress: Progress | None, timeout: float) -> dict[str, Any]:
    """Return QEMU's report of the migration that has begun, once it has ended; cancel it on timeout."""
    try:
        async with asyncio.timeout(timeout):
            return await _ended(coordinator, progress)
    except TimeoutError:
        with contextlib.suppress(
            TimeoutError
        ):  # in ``setup`` a cancel may hang QEMU, but ``setup`` may never end
            await coordinator.until(lambda: coordinator.report.status != "setup", _SETUP_TIMEOUT)
        with contextlib.suppress(QemuError):
            await coordinator.ports.qmp.execute("migrate_cancel")
        await _ended(coordinator, None)
        raise MigrationFailed(f"not done within {timeout:g} s; the guest continues here") from None


async def _ended(coordinator: Coordinator, progress: Progress | None) -> dict[str, Any]:
    """Wait for the end of a migration."""
    while True:
        found: dict[str, Any] = await coordinator.ports.qmp.execute("query-migrate")
        status = str(found.get("status"))
        if progress is not None:
            progress(found)
        if status in ENDED:
            # The answer may overtake the event, and only the event ends the coordinator's part.
            with contextlib.suppress(TimeoutError):
                await coordinator.until(lambda: coordinator.report.ended, _EVENT_TIMEOUT)
            return found
        with contextlib.suppress(TimeoutError):  # the event shortens the wait
            await coordinator.until(lambda: coordinator.report.ended, _POLL)


async def receive(
    coordinator: Coordinator,
    uri: str,
    *,
    descriptor: int | None = None,
    carrier: CarrierAddress | None = None,
) -> None:
    """Listen on ``uri`` for a guest; return when QEMU listens. See :func:`arrived`.

    ``descriptor``: the descriptor of this process that ``fd:`` names. ``carrier``: side channel for the emulator's
    state, if QEMU's stream does not carry it.
    """
    qmp = coordinator.ports.qmp
    if carrier is not None:
        await coordinator.listen(carrier)
    async with handed_over(qmp, uri, descriptor, incoming=True) as address:
        await qmp.execute("migrate-incoming", {"uri": address, "exit-on-error": False})


async def arrived(coordinator: Coordinator, timeout: float | None = 600.0) -> None:
    """Wait until the guest is here: it runs, or is stopped as it was before.

    Raises :class:`MigrationFailed` if it did not come, and ``TimeoutError`` after ``timeout`` seconds (``None``:
    never).
    """
    qmp = coordinator.ports.qmp
    async with asyncio.timeout(timeout):
        while coordinator.phase in (Phase.INCOMING, Phase.LOADED):
            found = await qmp.execute("query-migrate")
            if found.get("status") == "failed":
                raise MigrationFailed(
                    coordinator.load_refused or found.get("error-desc", "the migration failed")
                )
            if found.get("status") == "completed" and coordinator.phase is Phase.LOADED:
                state = await qmp.execute("query-status")
                if state["status"] == "paused":
                    return
            with contextlib.suppress(TimeoutError):
                await coordinator.until(lambda: coordinator.phase is Phase.IDLE, _ARRIVAL_POLL)
    if coordinator.phase is Phase.LOST:
        raise MigrationFailed(coordinator.load_refused)
