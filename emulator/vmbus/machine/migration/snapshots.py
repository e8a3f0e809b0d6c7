"""Snapshots of a running guest, in a qcow2 image that QEMU has open.

Source: docs/protocol/migration.md#snapshots.

    save    stop, pause, prepare the state, snapshot-save (QEMU asks for the state), resume
    load    stop, reset, snapshot-load (QEMU passes the state), resume

QEMU writes and reads guest memory without a handshake, so the emulator has to be paused before.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from vmbus.errors import QemuError, UserError
from vmbus.machine.migration.configuration import read_configuration
from vmbus.machine.migration.coordinator import SETTLE_TIMEOUT, Coordinator
from vmbus.machine.migration.fence import FENCE_NODE
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.qemu.launch import SNAPSHOT_NODE

_POLL = 0.02
"""Seconds between two ``query-jobs``."""


class SnapshotFailed(UserError):
    """A snapshot that was not made or loaded; the message says why, and what the guest does now."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of the machine. ``size``: bytes of memory and device state; ``date``: seconds since 1970."""

    tag: str
    size: int
    date: int


async def save(coordinator: Coordinator, tag: str, *, timeout: float = 600.0) -> Report:
    """Save the guest as ``tag``, then resume it if it ran. Raises :class:`SnapshotFailed`."""
    nodes = await _nodes(coordinator)
    if tag in [each.tag for each in await listed(coordinator)]:
        raise SnapshotFailed(f"there is a snapshot {tag} already; delete it first, or choose another name")
    await _check_capabilities(coordinator)
    ran = await _stop(coordinator)
    try:
        await coordinator.begin_snapshot()
        if coordinator.report.refusal:
            raise SnapshotFailed(f"the guest cannot be saved: {coordinator.report.refusal}")
        if coordinator.phase is not Phase.SNAPSHOT:
            raise SnapshotFailed("another program resumed the guest before it was saved; nothing was saved")
        await _job(coordinator, "snapshot-save", tag, nodes, timeout)
        return coordinator.report
    finally:
        coordinator.end_snapshot()
        if ran:
            await coordinator.ports.qmp.cont()


async def load(coordinator: Coordinator, tag: str, *, timeout: float = 600.0) -> None:
    """Restore the guest of ``tag``; it runs then if the guest ran before. Raises :class:`SnapshotFailed`."""
    nodes = await _nodes(coordinator, Phase.IDLE, Phase.LOST)
    await _check_exists(coordinator, tag)
    await _check_capabilities(coordinator)
    ran = await _stop(coordinator)
    ports, state = coordinator.ports, coordinator.state
    state.pause_channels()
    if not await ports.workers.settle(SETTLE_TIMEOUT):
        if ran:
            await ports.qmp.cont()
        raise SnapshotFailed("a device's work did not end in time, nothing was changed; try again")
    state.reset()
    coordinator.expect()
    await ports.qtest.settled()  # no interrupt of the guest that goes reaches the one that comes
    try:
        await _job(coordinator, "snapshot-load", tag, nodes, timeout)
    except SnapshotFailed as error:
        coordinator.abandon()
        why = coordinator.load_refused or str(error)
        raise SnapshotFailed(f"{why}; the guest stays stopped: load another snapshot, or reset it") from error
    if coordinator.phase is not Phase.LOADED:
        coordinator.abandon()
        raise SnapshotFailed(f"{tag} was made without the emulator's state; the guest stays stopped")
    if ran:
        await ports.qmp.cont()


async def delete(coordinator: Coordinator, tag: str, *, timeout: float = 600.0) -> None:
    """Delete ``tag`` from every image. Raises :class:`SnapshotFailed`."""
    nodes = await _nodes(coordinator)
    await _check_exists(coordinator, tag)
    await _job(coordinator, "snapshot-delete", tag, nodes, timeout)


async def listed(coordinator: Coordinator) -> list[Snapshot]:
    """Return the snapshots of the machine, oldest first."""
    found: dict[str, Snapshot] = {}
    for node in await coordinator.ports.qmp.execute("query-named-block-nodes"):
        for each in node["image"].get("snapshots", ()):
            known = found.get(each["name"])
            size = max(each["vm-state-size"], known.size if known else 0)
            found[each["name"]] = Snapshot(each["name"], size, each["date-sec"])
    return sorted((each for each in found.values() if each.size), key=lambda each: each.date)


async def _check_exists(coordinator: Coordinator, tag: str) -> None:
    if tag not in [each.tag for each in await listed(coordinator)]:
        raise SnapshotFailed(f"there is no snapshot {tag}; `vmbus snapshot list` shows what there is")


async def _nodes(coordinator: Coordinator, *phases: Phase) -> list[str]:
    """Return the images that take part: every writable qcow2 node. The first one gets guest memory."""
    if coordinator.ports.dbus_address is None:
        raise SnapshotFailed(
            "this QEMU runs without -object dbus-vmstate, which carries the emulator's state: "
            "`vmbus qemu-args --migratable` prints the options"
        )
    if coordinator.phase not in (phases or (Phase.IDLE,)):
        raise SnapshotFailed(f"no snapshot can be made or loaded now: the guest is {coordinator.phase.value}")
    found = [
        str(node["node-name"])
        for node in await coordinator.ports.qmp.execute("query-named-block-nodes")
        if node["drv"] == "qcow2" and not node["ro"] and node["node-name"] != FENCE_NODE
    ]
    if not found:
        raise SnapshotFailed(
            "QEMU has no writable qcow2 image to put a snapshot into: start the guest with --snapshots FILE"
        )
    return sorted(found, key=lambda name: name != SNAPSHOT_NODE)


async def _check_capabilities(coordinator: Coordinator) -> None:
    """Refuse capabilities that exclude snapshots: they apply to snapshots as well as to migrations."""
    if why := (await read_configuration(coordinator.ports.qmp)).snapshot_refusal:
        raise SnapshotFailed(f"QEMU's migration settings exclude snapshots: {why}; nothing was changed")


async def _stop(coordinator: Coordinator) -> bool:
    """Stop the guest; return whether it ran."""
    qmp = coordinator.ports.qmp
    ran = bool((await qmp.execute("query-status"))["running"])
    if ran:
        await qmp.execute("stop")
    return ran


async def _job(coordinator: Coordinator, command: str, tag: str, nodes: list[str], timeout: float) -> None:
    """Run a job of QEMU's to its end."""
    qmp = coordinator.ports.qmp
    name = f"vmbus-{secrets.token_hex(4)}"
    arguments: dict[str, Any] = {"job-id": name, "tag": tag, "devices": nodes}
    if command != "snapshot-delete":
        arguments["vmstate"] = nodes[0]
    try:
        await qmp.execute(command, arguments)
        async with asyncio.timeout(timeout):
            while True:
                jobs = [job for job in await qmp.execute("query-jobs") if job["id"] == name]
                if not jobs or jobs[0]["status"] == "concluded":
                    break
                await asyncio.sleep(_POLL)
        if jobs:
            await qmp.execute("job-dismiss", {"id": name})
    except QemuError as error:
        raise SnapshotFailed(str(error)) from error
    except TimeoutError:
        raise SnapshotFailed(f"QEMU did not finish {command} within {timeout:g} s") from None
    if jobs and (why := jobs[0].get("error")):
        raise SnapshotFailed(f"{command}: {why}")
