"""Snapshots of a running guest, in a qcow2 image that QEMU has open.

Source: docs/protocol/migration.md#snapshots.

    save    stop, pause, prepare the state, snapshot-save (QEMU asks for the state), save the disks, resume
    load    check, stop, pause, put the disks back, snapshot-load (QEMU passes the state, for which what is here is
            dropped), resume

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmbus.errors import QemuError, QemuGone
from vmbus.machine.migration import snapshot_disks
from vmbus.machine.migration.alone import alone
from vmbus.machine.migration.configuration import read_configuration
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.fence import FENCE_NODE
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.snapshot_disks import NotBegun, name_on_disk
from vmbus.machine.migration.snapshot_disks import SnapshotFailed as SnapshotFailed
from vmbus.machine.migration.snapshot_state import read_state
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.migration.switchover import SETTLE_TIMEOUT
from vmbus.machine.qemu.launch import SNAPSHOT_NODE
from vmbus.machine.qemu.qcow2 import CannotLook
from vmbus.saving import StateRefused

_logger = logging.getLogger(__name__)

_MAX_NAME = 255
"""Bytes of a snapshot's name in QEMU."""
_POLL = 0.02
"""Seconds between two ``query-jobs``."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of the machine. ``size``: bytes of memory and device state; ``date``: seconds since 1970.

    ``disks``: names of the disks that hold their part of it.
    """

    tag: str
    size: int
    date: int
    disks: tuple[str, ...] = ()


async def save(
    coordinator: Coordinator, tag: str, *, without_disks: bool = False, timeout: float = 600.0
) -> Report:
    """Save the guest and its disks as ``tag``, then resume it if it ran. Raises :class:`SnapshotFailed`.

    ``without_disks``: although the guest can write to disks that the snapshot does not hold.
    """
    _check_name(tag)
    with alone(coordinator, "vmbus snapshot save", SnapshotFailed):
        return await _save(coordinator, tag, without_disks, timeout)


async def _save(coordinator: Coordinator, tag: str, without_disks: bool, timeout: float) -> Report:
    images = await _images(coordinator)
    if not without_disks:
        await _check_disks(coordinator, images)
    if any(tag in image.with_state for image in images):
        raise SnapshotFailed(f"there is a snapshot {tag} already; delete it first, or choose another name")
    await _check_capabilities(coordinator)
    ran = await _stop(coordinator)
    try:
        if not _in(coordinator, Phase.IDLE):
            raise SnapshotFailed(f"the guest is {coordinator.phase.value} by now; nothing was saved")
        await coordinator.begin_snapshot()
        if coordinator.report.refusal:
            raise SnapshotFailed(f"the guest cannot be saved: {coordinator.report.refusal}")
        if coordinator.phase is not Phase.SNAPSHOT:
            raise SnapshotFailed("another program resumed the guest before it was saved; nothing was saved")
        await _job(coordinator, "snapshot-save", tag, images, timeout)
        await _complete(coordinator, tag, timeout)
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
    with alone(coordinator, "vmbus snapshot load", SnapshotFailed):
        await _load(coordinator, tag, without_disks, allow_missing_devices, timeout)


async def _load(
    coordinator: Coordinator, tag: str, without_disks: bool, allow_missing_devices: bool, timeout: float
) -> None:
    images = await _images(coordinator, Phase.IDLE, Phase.LOST)
    _check_is_meant(images, tag, everywhere=True)
    if not without_disks:
        await _check_disks(coordinator, images)
    await _check_capabilities(coordinator)
    await _check_fits(coordinator, images[0], tag, allow_missing=allow_missing_devices)
    name = name_on_disk(tag, *images[0].made[tag])
    disks = await snapshot_disks.check(
        coordinator.state.snapshot_disks(), name, tag, without_disks=without_disks
    )
    before = coordinator.phase
    ran = await _stop(coordinator)
    ports, state = coordinator.ports, coordinator.state
    try:
        await forget_failed_migration(coordinator, images[0], timeout)
    except SnapshotFailed:
        if ran:
            await ports.qmp.cont()
        raise
    state.pause_channels()
    if not await ports.workers.settle(SETTLE_TIMEOUT):
        if ran:
            await ports.qmp.cont()
        raise SnapshotFailed("a device's work did not end in time, nothing was changed; try again")
    if not _in(coordinator, before):
        if ran:
            await ports.qmp.cont()
        raise SnapshotFailed(f"the guest is {coordinator.phase.value} by now; nothing was changed")
    coordinator.expect_instead(allow_missing_devices=allow_missing_devices)
    await ports.qtest.settled()  # no interrupt of the guest that goes reaches the one that comes
    if (await ports.qmp.execute("query-status"))["running"]:  # from now on RESUME changes the phase
        coordinator.expect_no_more(before)
        state.resume()
        raise SnapshotFailed("another program resumed the guest before it was given up; nothing was changed")
    try:
        async with snapshot_disks.put_back(disks, name):
            if not _in(coordinator, Phase.INCOMING):
                raise NotBegun("another program resumed the guest while its disks were put back")
            await _job(coordinator, "snapshot-load", tag, images, timeout)
            if not _in(coordinator, Phase.LOADED):
                raise SnapshotFailed(f"{tag} was made without the emulator's state")
    except NotBegun as error:
        coordinator.expect_no_more(before)
        if not error.disks_stay:
            raise SnapshotFailed(
                f"{error}; the guest stays stopped until its disks fit its memory"
            ) from error
        if ran:
            await ports.qmp.cont()
        raise SnapshotFailed(f"{error}; nothing was changed") from error
    except SnapshotFailed as error:
        coordinator.abandon()
        why = coordinator.load_refused or str(error)
        raise SnapshotFailed(f"{why}; the guest stays stopped: load another snapshot, or reset it") from error
    if ran:
        await ports.qmp.cont()
    else:
        coordinator.stay_stopped()


async def delete(coordinator: Coordinator, tag: str, *, timeout: float = 600.0) -> None:
    """Delete ``tag`` from every image, the disks' first. Raises :class:`SnapshotFailed`."""
    with alone(coordinator, "vmbus snapshot delete", SnapshotFailed):
        images = await _images(coordinator)
        _check_is_meant(images, tag, everywhere=False)
        names = {name_on_disk(tag, *image.made[tag]) for image in images if tag in image.made}
        await snapshot_disks.delete(coordinator.state.snapshot_disks(), sorted(names), tag)
        await _job(coordinator, "snapshot-delete", tag, images, timeout)


async def listed(coordinator: Coordinator) -> list[Snapshot]:
    """Return the snapshots of the machine, oldest first."""
    found: dict[str, Snapshot] = {}
    names: dict[str, str] = {}
    for node in await coordinator.ports.qmp.execute("query-named-block-nodes"):
        for each in node["image"].get("snapshots", ()):
            tag, known = each["name"], found.get(each["name"])
            size = max(each["vm-state-size"], known.size if known else 0)
            found[tag] = Snapshot(tag, size, each["date-sec"])
            if each["vm-state-size"]:
                names[tag] = name_on_disk(tag, each["date-sec"], each["date-nsec"])
    holding = await snapshot_disks.holding(coordinator.state.snapshot_disks(), list(names.values()))
    complete = [replace(found[tag], disks=tuple(holding[name])) for tag, name in names.items()]
    return sorted(complete, key=lambda each: each.date)


async def _complete(coordinator: Coordinator, tag: str, timeout: float) -> None:
    """Check a machine that was just saved, and save its disks; if that fails, nothing of the snapshot stays."""
    disks = coordinator.state.snapshot_disks()
    if coordinator.handed_over and not disks:
        return
    images = await _images(coordinator, *Phase)
    try:
        if not coordinator.handed_over:  # QEMU reports no error of that, and it could never be loaded
            here = coordinator.phase is Phase.SNAPSHOT
            why = coordinator.report.refusal or (
                "it was not asked for" if here else "another program resumed it"
            )
            raise SnapshotFailed(f"QEMU saved the guest without the emulator's state: {why}")
        name = name_on_disk(tag, *images[0].made[tag])
        await snapshot_disks.save(disks, name)
        if coordinator.phase is not Phase.SNAPSHOT:
            await snapshot_disks.delete(disks, [name], tag)
            raise SnapshotFailed("another program resumed the guest while it was saved")
    except SnapshotFailed as error:
        try:
            await _job(coordinator, "snapshot-delete", tag, images, timeout)
        except SnapshotFailed as second:
            raise SnapshotFailed(
                f"{error}; of snapshot {tag}, which cannot be loaded, there is still the machine: {second}"
            ) from error
        raise SnapshotFailed(f"{error}; nothing was saved") from error


def _check_name(tag: str) -> None:
    """Refuse names that QEMU would take for an id, or would cut off."""
    if re.fullmatch(r"[0-9]*", tag) or len(tag.encode()) > _MAX_NAME:
        raise SnapshotFailed(
            f"{tag!r} cannot be the name of a snapshot: QEMU takes digits for the id of one; choose a name with a "
            f"letter, of at most {_MAX_NAME} bytes"
        )


@dataclass(frozen=True, slots=True)
class ImageNode:
    """An image that takes part in snapshots. ``names``: of its snapshots, by id."""

    node: str
    file: Path
    names: Mapping[str, str]
    with_state: frozenset[str]
    """Names of the snapshots that have guest memory."""
    made: Mapping[str, tuple[int, int]]
    """When each snapshot was made: seconds since 1970, and nanoseconds."""


async def _images(coordinator: Coordinator, *phases: Phase) -> list[ImageNode]:
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
                ImageNode(
                    str(node["node-name"]),
                    Path(str(node["image"]["filename"])),
                    {str(each["id"]): str(each["name"]) for each in there},
                    frozenset(str(each["name"]) for each in there if each["vm-state-size"]),
                    {str(each["name"]): (int(each["date-sec"]), int(each["date-nsec"])) for each in there},
                )
            )
    if not found:
        raise SnapshotFailed(
            "QEMU has no writable qcow2 image to put a snapshot into: start the guest with --snapshots FILE"
        )
    return sorted(found, key=lambda image: image.node != SNAPSHOT_NODE)


def _check_is_meant(images: Sequence[ImageNode], tag: str, *, everywhere: bool) -> None:
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


async def _check_disks(coordinator: Coordinator, images: Sequence[ImageNode]) -> None:
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
            "be older than its disks, which damages file systems. Make them read-only (readonly=on), convert "
            "them to qcow2, which a snapshot holds, have raw files copied (copies=FOLDER), or add --without-disks "
            "and put the disks back yourself while the guest is stopped"
        )


async def _check_fits(coordinator: Coordinator, image: ImageNode, tag: str, *, allow_missing: bool) -> None:
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


async def forget_failed_migration(coordinator: Coordinator, image: ImageNode, timeout: float) -> None:
    """Have QEMU forget how an earlier migration failed, with the guest stopped.

    QEMU keeps the error of a migration that failed or was cancelled, takes it for one of the load, and fails the load
    at its end, when the guest that was here is gone. Only the beginning of another migration or snapshot clears it:
    so one is saved and deleted. A guest that is lost has no state to save: that snapshot has a refusal in its place.
    """
    if "error-desc" not in await coordinator.ports.qmp.execute("query-migrate"):
        return
    scratch = f"vmbus-scratch-{secrets.token_hex(4)}"
    lost = coordinator.phase is Phase.LOST
    try:
        if not lost:
            await coordinator.begin_snapshot()
            if coordinator.report.refusal:
                raise SnapshotFailed(coordinator.report.refusal)
        await _job(coordinator, "snapshot-save", scratch, [image], timeout)
        await _job(coordinator, "snapshot-delete", scratch, [image], timeout)
    except SnapshotFailed as error:
        raise SnapshotFailed(
            "QEMU would fail the load because of a migration that failed before, and cannot be made to forget that: "
            f"{error}; nothing was changed, migrate the guest and load the snapshot there"
        ) from error
    finally:
        if not lost:
            coordinator.end_snapshot()


def _in(coordinator: Coordinator, phase: Phase) -> bool:
    """Return whether the guest is in ``phase``, which changes whenever this process waits."""
    return coordinator.phase is phase


async def _stop(coordinator: Coordinator) -> bool:
    """Stop the guest; return whether it ran."""
    qmp = coordinator.ports.qmp
    ran = bool((await qmp.execute("query-status"))["running"])
    if ran:
        await qmp.execute("stop")
    return ran


async def _job(
    coordinator: Coordinator, command: str, tag: str, images: Sequence[ImageNode], timeout: float
) -> None:
    """Run a job of QEMU's to its end. Raises :class:`NotBegun` if QEMU did not begin it."""
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
        raise NotBegun(str(error)) from error
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
