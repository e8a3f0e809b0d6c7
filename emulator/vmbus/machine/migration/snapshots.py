"""Snapshots of a running guest, in a qcow2 image that QEMU has open.

Source: docs/protocol/migration.md#snapshots.

    save    stop, pause, prepare the state, snapshot-save (QEMU asks for the state), resume
    load    check, stop, pause, snapshot-load (QEMU passes the state, for which what is here is dropped), resume

QEMU writes and reads guest memory without a handshake, so the emulator has to be paused before. Nothing of a guest
that runs is given up before it is known that the snapshot is in every image, and that its state fits here.

QEMU looks for a snapshot by its id first, which is a number, and then by its name: names of digits are refused.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbus.errors import QemuError, QemuGone, UserError
from vmbus.machine.migration.configuration import read_configuration
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.fence import FENCE_NODE
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.snapshot_state import CannotLook, read_state
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.migration.switchover import SETTLE_TIMEOUT
from vmbus.machine.qemu.launch import SNAPSHOT_NODE
from vmbus.saving import StateRefused

_logger = logging.getLogger(__name__)

_MAX_NAME = 255
"""Bytes of a snapshot's name in QEMU."""
_POLL = 0.02
"""Seconds between two ``query-jobs``."""


class SnapshotFailed(UserError):
    """A snapshot that was not made or loaded; the message says why, and what the guest does now."""


class _NotBegun(SnapshotFailed):
    """A job that QEMU did not begin."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of the machine. ``size``: bytes of memory and device state; ``date``: seconds since 1970."""

    tag: str
    size: int
    date: int


async def save(
    coordinator: Coordinator, tag: str, *, without_disks: bool = False, timeout: float = 600.0
) -> Report:
    """Save the guest as ``tag``, then resume it if it ran. Raises :class:`SnapshotFailed`.

    ``without_disks``: although the guest can write to disks that the snapshot does not hold.
    """
    _check_name(tag)
    images = await _images(coordinator)
    if not without_disks:
        await _check_disks(coordinator, images)
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
        await _job(coordinator, "snapshot-save", tag, images, timeout)
        return coordinator.report
    finally:
        coordinator.end_snapshot()
        if ran:
            await coordinator.ports.qmp.cont()


async def load(
    coordinator: Coordinator,
    tag: str,
    *,
    without_disks: bool = False,
    allow_missing_devices: bool = False,
    timeout: float = 600.0,
) -> None:
    """Restore the guest of ``tag``; it runs then if the guest ran before. Raises :class:`SnapshotFailed`.

    Whatever can be known before is checked first: then the guest goes on as it is. ``without_disks``: as in
    :func:`save`. ``allow_missing_devices``: although devices of the snapshot are missing here; their channels are
    revoked.
    """
    images = await _images(coordinator, Phase.IDLE, Phase.LOST)
    _check_is_meant(images, tag, everywhere=True)
    if not without_disks:
        await _check_disks(coordinator, images)
    await _check_capabilities(coordinator)
    await _check_fits(coordinator, images[0], tag, allow_missing=allow_missing_devices)
    ran = await _stop(coordinator)
    ports, state = coordinator.ports, coordinator.state
    state.pause_channels()
    if not await ports.workers.settle(SETTLE_TIMEOUT):
        if ran:
            await ports.qmp.cont()
        raise SnapshotFailed("a device's work did not end in time, nothing was changed; try again")
    try:
        await _forget_failed_migration(coordinator, images[0], timeout)
    except SnapshotFailed:
        if ran:
            await ports.qmp.cont()
        raise
    before = coordinator.phase
    coordinator.expect_instead(allow_missing_devices=allow_missing_devices)
    await ports.qtest.settled()  # no interrupt of the guest that goes reaches the one that comes
    try:
        await _job(coordinator, "snapshot-load", tag, images, timeout)
    except _NotBegun as error:
        coordinator.expect_no_more(before)
        if ran:
            await ports.qmp.cont()
        raise SnapshotFailed(f"{error}; nothing was changed") from error
    except SnapshotFailed as error:
        coordinator.abandon()
        why = coordinator.load_refused or str(error)
        raise SnapshotFailed(f"{why}; the guest stays stopped: load another snapshot, or reset it") from error
    if coordinator.phase is not Phase.LOADED:
        coordinator.abandon()
        raise SnapshotFailed(f"{tag} was made without the emulator's state; the guest stays stopped")
    if ran:
        await ports.qmp.cont()
    else:
        coordinator.stay_stopped()


async def delete(coordinator: Coordinator, tag: str, *, timeout: float = 600.0) -> None:
    """Delete ``tag`` from every image. Raises :class:`SnapshotFailed`."""
    images = await _images(coordinator)
    _check_is_meant(images, tag, everywhere=False)
    await _job(coordinator, "snapshot-delete", tag, images, timeout)


async def listed(coordinator: Coordinator) -> list[Snapshot]:
    """Return the snapshots of the machine, oldest first."""
    found: dict[str, Snapshot] = {}
    for node in await coordinator.ports.qmp.execute("query-named-block-nodes"):
        for each in node["image"].get("snapshots", ()):
            known = found.get(each["name"])
            size = max(each["vm-state-size"], known.size if known else 0)
            found[each["name"]] = Snapshot(each["name"], size, each["date-sec"])
    return sorted((each for each in found.values() if each.size), key=lambda each: each.date)


def _check_name(tag: str) -> None:
    """Refuse names that QEMU would take for an id, or would cut off."""
    if re.fullmatch(r"[0-9]*", tag) or len(tag.encode()) > _MAX_NAME:
        raise SnapshotFailed(
            f"{tag!r} cannot be the name of a snapshot: QEMU takes digits for the id of one; choose a name with a "
            f"letter, of at most {_MAX_NAME} bytes"
        )


@dataclass(frozen=True, slots=True)
class _ImageNode:
    """An image that takes part in snapshots. ``names``: of its snapshots, by id."""

    node: str
    file: Path
    names: Mapping[str, str]
    with_state: frozenset[str]
    """Names of the snapshots that have guest memory."""


async def _images(coordinator: Coordinator, *phases: Phase) -> list[_ImageNode]:
    """Return the images that take part: every writable qcow2 node. The first one gets guest memory."""
    if coordinator.ports.dbus_address is None:
        raise SnapshotFailed(
            "this QEMU runs without -object dbus-vmstate, which carries the emulator's state: "
            "`vmbus qemu-args --migratable` prints the options"
        )
    if coordinator.phase not in (phases or (Phase.IDLE,)):
        raise SnapshotFailed(f"no snapshot can be made or loaded now: the guest is {coordinator.phase.value}")
    found = []
    for node in await coordinator.ports.qmp.execute("query-named-block-nodes"):
        if node["drv"] == "qcow2" and not node["ro"] and node["node-name"] != FENCE_NODE:
            there = node["image"].get("snapshots", ())
            found.append(
                _ImageNode(
                    str(node["node-name"]),
                    Path(str(node["image"]["filename"])),
                    {str(each["id"]): str(each["name"]) for each in there},
                    frozenset(str(each["name"]) for each in there if each["vm-state-size"]),
                )
            )
    if not found:
        raise SnapshotFailed(
            "QEMU has no writable qcow2 image to put a snapshot into: start the guest with --snapshots FILE"
        )
    return sorted(found, key=lambda image: image.node != SNAPSHOT_NODE)


def _check_is_meant(images: Sequence[_ImageNode], tag: str, *, everywhere: bool) -> None:
    """Check that QEMU finds the snapshot that is meant; ``everywhere``: in each image, with memory in the first."""
    if not any(tag in image.names.values() for image in images):
        raise SnapshotFailed(f"there is no snapshot {tag}; `vmbus snapshot list` shows what there is")
    for image in images:
        other = image.names.get(tag, tag)
        if other != tag:
            raise SnapshotFailed(
                f"{tag} is also the id of snapshot {other} in {image.file}, which QEMU would take"
            )
        if everywhere and tag not in image.names.values():
            raise SnapshotFailed(
                f"{image.file} has no snapshot {tag}, other images have one: this image was added since; nothing was "
                "changed"
            )
    if everywhere and tag not in images[0].with_state:
        raise SnapshotFailed(f"{images[0].file} has no guest memory in snapshot {tag}; nothing was changed")


async def _check_disks(coordinator: Coordinator, images: Sequence[_ImageNode]) -> None:
    """Refuse what the guest can write to and a snapshot does not rewind: its file system would not fit its memory."""
    nodes = {image.node for image in images}
    outside = coordinator.state.outside_snapshots()
    for drive in await coordinator.ports.qmp.execute("query-block"):
        node = drive.get("inserted")
        if node and not node["ro"] and node.get("node-name") not in nodes:
            outside.append(f"QEMU's {drive.get('device') or drive.get('qdev') or 'drive'} ({node['file']})")
    if outside:
        raise SnapshotFailed(
            f"a snapshot does not hold what the guest writes to {', '.join(outside)}: after a load its memory would "
            "be older than its disks, which damages file systems. Make them read-only (readonly=on), or add "
            "--without-disks and put the disks back yourself while the guest is stopped"
        )


async def _check_fits(coordinator: Coordinator, image: _ImageNode, tag: str, *, allow_missing: bool) -> None:
    """Check that the emulator's state in a snapshot can be restored here, as far as that can be seen before."""
    try:
        state = await asyncio.to_thread(read_state, image.file, tag)
    except CannotLook as error:
        _logger.info("the state in snapshot %s is checked only when it is loaded: %s", tag, error)
        return
    if state is None:
        raise SnapshotFailed(f"{tag} was made without the emulator's state; nothing was changed")
    try:
        coordinator.state.check_fits(state, allow_missing=allow_missing)
    except StateRefused as error:
        raise SnapshotFailed(f"{tag} cannot be restored here: {error}; nothing was changed") from error


async def _check_capabilities(coordinator: Coordinator) -> None:
    """Refuse capabilities that exclude snapshots: they apply to snapshots as well as to migrations."""
    if why := (await read_configuration(coordinator.ports.qmp)).snapshot_refusal:
        raise SnapshotFailed(f"QEMU's migration settings exclude snapshots: {why}; nothing was changed")


async def _forget_failed_migration(coordinator: Coordinator, image: _ImageNode, timeout: float) -> None:
    """Have QEMU forget how an earlier migration failed, with the guest stopped.

    QEMU keeps the error of a migration that failed or was cancelled, takes it for one of the load, and fails the load
    at its end, when the guest that was here is gone. Only the beginning of another migration or snapshot clears it:
    so one is saved and deleted.
    """
    qmp = coordinator.ports.qmp
    if "error-desc" not in await qmp.execute("query-migrate"):
        return
    scratch = f"vmbus-scratch-{secrets.token_hex(4)}"
    try:
        await _job(coordinator, "snapshot-save", scratch, [image], timeout)
        await _job(coordinator, "snapshot-delete", scratch, [image], timeout)
    except SnapshotFailed as error:
        raise SnapshotFailed(
            "QEMU would fail the load because of a migration that failed before, and cannot be made to forget that: "
            f"{error}; nothing was changed, migrate the guest and load the snapshot there"
        ) from error


async def _stop(coordinator: Coordinator) -> bool:
    """Stop the guest; return whether it ran."""
    qmp = coordinator.ports.qmp
    ran = bool((await qmp.execute("query-status"))["running"])
    if ran:
        await qmp.execute("stop")
    return ran


async def _job(
    coordinator: Coordinator, command: str, tag: str, images: Sequence[_ImageNode], timeout: float
) -> None:
    """Run a job of QEMU's to its end. Raises :class:`_NotBegun` if QEMU did not begin it."""
    qmp = coordinator.ports.qmp
    name = f"vmbus-{secrets.token_hex(4)}"
    arguments: dict[str, Any] = {"job-id": name, "tag": tag, "devices": [image.node for image in images]}
    if command != "snapshot-delete":
        arguments["vmstate"] = images[0].node
    try:
        await qmp.execute(command, arguments)
    except QemuGone:
        raise
    except QemuError as error:
        raise _NotBegun(str(error)) from error
    try:
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
