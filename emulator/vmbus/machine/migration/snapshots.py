"""Snapshots of a running guest, in a qcow2 image that QEMU has open.

Source: docs/protocol/migration.md#snapshots.

    save    stop, freeze, make the state ready, snapshot-save (QEMU asks for the state), continue
    load    stop, forget, snapshot-load (QEMU hands the state over), continue

QEMU writes and reads guest memory without a handshake, so it is the emulator that has to stand still first.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmbus.errors import QemuError, UserError
from vmbus.machine.migration.configuration import read_configuration
from vmbus.machine.migration.coordinator import SETTLE_LIMIT, Phase
from vmbus.machine.migration.report import Report
from vmbus.machine.qemu.launch import SNAPSHOT_NODE

if TYPE_CHECKING:
    from vmbus.machine.host import Host

_POLL = 0.02


class SnapshotFailed(UserError):
    """No snapshot was made or loaded; the message says why, and what the guest does now."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One that is in every image. ``size``: bytes of memory and device state; ``date``: seconds since 1970."""

    tag: str
    size: int
    date: int


async def save(host: Host, tag: str, *, limit: float = 600.0) -> Report:
    """Save the guest as ``tag``, then let it go on if it ran. Raises :class:`SnapshotFailed`."""
    nodes = await _nodes(host)
    if tag in [each.tag for each in await listed(host)]:
        raise SnapshotFailed(f"there is a snapshot {tag} already; delete it first, or choose another name")
    await _check_capabilities(host)
    ran = await _stop(host)
    coordinator = host.migration
    try:
        await coordinator.make_ready()
        if coordinator.report.refusal:
            raise SnapshotFailed(f"the guest cannot be saved: {coordinator.report.refusal}")
        await _job(host, "snapshot-save", tag, nodes, limit)
        return coordinator.report
    finally:
        coordinator.phase = Phase.IDLE
        if ran:
            await host.qmp.cont()


async def load(host: Host, tag: str, *, limit: float = 600.0) -> None:
    """Put the guest back to ``tag``; it runs then if it ran before. Raises :class:`SnapshotFailed`."""
    nodes = await _nodes(host, Phase.IDLE, Phase.LOST)
    if tag not in [each.tag for each in await listed(host)]:
        raise SnapshotFailed(f"there is no snapshot {tag}; `vmbus snapshot list` shows what there is")
    await _check_capabilities(host)
    ran = await _stop(host)
    coordinator = host.migration
    coordinator.state.hold()
    if not await host.workers.settle(SETTLE_LIMIT):
        if ran:
            await host.qmp.cont()
        raise SnapshotFailed("a device's work did not end in time, nothing was changed; try again")
    coordinator.state.forget()
    coordinator.expect()
    try:
        await _job(host, "snapshot-load", tag, nodes, limit)
    except SnapshotFailed as error:
        coordinator.abandon()
        why = coordinator.load_refused or str(error)
        raise SnapshotFailed(f"{why}; the guest stays stopped: load another snapshot, or reset it") from error
    if coordinator.phase is not Phase.LOADED:
        coordinator.abandon()
        raise SnapshotFailed(f"{tag} was made without the emulator's state; the guest stays stopped")
    if ran:
        await host.qmp.cont()


async def delete(host: Host, tag: str, *, limit: float = 600.0) -> None:
    """Delete ``tag`` from every image. Raises :class:`SnapshotFailed`."""
    nodes = await _nodes(host)
    if tag not in [each.tag for each in await listed(host)]:
        raise SnapshotFailed(f"there is no snapshot {tag}; `vmbus snapshot list` shows what there is")
    await _job(host, "snapshot-delete", tag, nodes, limit)


async def listed(host: Host) -> list[Snapshot]:
    """The snapshots of the machine, oldest first."""
    found: dict[str, Snapshot] = {}
    for node in await host.qmp.execute("query-named-block-nodes"):
        for each in node["image"].get("snapshots", ()):
            known = found.get(each["name"])
            size = max(each["vm-state-size"], known.size if known else 0)
            found[each["name"]] = Snapshot(each["name"], size, each["date-sec"])
    return sorted((each for each in found.values() if each.size), key=lambda each: each.date)


async def _nodes(host: Host, *phases: Phase) -> list[str]:
    """The images that take part: every writable qcow2 node; the first is where memory goes."""
    coordinator = host.migration
    if host.facts.dbus_address is None:
        raise SnapshotFailed(
            "this QEMU runs without -object dbus-vmstate, which carries the emulator's state"
        )
    if coordinator.phase not in (phases or (Phase.IDLE,)):
        raise SnapshotFailed(f"not now: the guest is {coordinator.phase.value}")
    found = [
        str(node["node-name"])
        for node in await host.qmp.execute("query-named-block-nodes")
        if node["drv"] == "qcow2" and not node["ro"]
    ]
    if not found:
        raise SnapshotFailed(
            "QEMU has no writable qcow2 image to put a snapshot into: start the guest with --snapshots FILE"
        )
    return sorted(found, key=lambda name: name != SNAPSHOT_NODE)


async def _check_capabilities(host: Host) -> None:
    """What is set for migrations holds for snapshots too: with ``x-ignore-shared`` one would have no memory."""
    if why := (await read_configuration(host.qmp)).snapshot_refusal:
        raise SnapshotFailed(f"not with what is set for migrations: {why}; nothing was changed")


async def _stop(host: Host) -> bool:
    """Stop the guest; whether it ran."""
    ran = bool((await host.qmp.execute("query-status"))["running"])
    if ran:
        await host.qmp.execute("stop")
    return ran


async def _job(host: Host, command: str, tag: str, nodes: list[str], limit: float) -> None:
    """Run a job of QEMU's to its end."""
    name = f"vmbus-{secrets.token_hex(4)}"
    arguments: dict[str, Any] = {"job-id": name, "tag": tag, "devices": nodes}
    if command != "snapshot-delete":
        arguments["vmstate"] = nodes[0]
    try:
        await host.qmp.execute(command, arguments)
        async with asyncio.timeout(limit):
            while True:
                jobs = [job for job in await host.qmp.execute("query-jobs") if job["id"] == name]
                if not jobs or jobs[0]["status"] == "concluded":
                    break
                await asyncio.sleep(_POLL)
        if jobs:
            await host.qmp.execute("job-dismiss", {"id": name})
    except QemuError as error:
        raise SnapshotFailed(str(error)) from error
    except TimeoutError:
        raise SnapshotFailed(f"QEMU did not finish {command} within {limit:g} s") from None
    if jobs and (why := jobs[0].get("error")):
        raise SnapshotFailed(f"{command}: {why}")
