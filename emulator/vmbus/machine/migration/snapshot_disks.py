"""The disks in a snapshot of the machine: saved, found, put back and deleted with it.

    machine's snapshot   TAG, in QEMU's images; QEMU notes when it was made
    disk's snapshot      vmbus-TAG@SECONDS.NANOSECONDS, in the disk's image: belongs to that one and no other

A disk is saved after the machine, while the guest still stands still: an emulator that dies in between leaves a
snapshot of the machine that is listed, cannot be loaded and can be deleted, and nothing that nobody knows of. A disk
is put back before the machine is loaded. What was in it is kept under a name of its own until the machine is there,
and comes back if the machine does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.errors import UserError, VmbusError

_logger = logging.getLogger(__name__)

_MAX_NAME = 255
"""Bytes of the name of a snapshot in QEMU."""

Disks = Mapping[str, SnapshotDisk]


class SnapshotFailed(UserError):
    """A snapshot that was not made or loaded; the message says why, and what the guest does now."""

    disks_stay = True
    """False: a disk was put back for a load that failed, and is not as it was before."""


class NotBegun(SnapshotFailed):
    """QEMU has not begun: guest memory and devices are as before."""


def name_on_disk(tag: str, seconds: int, nanoseconds: int) -> str:
    """Return the name of a disk's part of the machine's snapshot ``tag``, made at this time since 1970."""
    moment = f"@{seconds}.{nanoseconds:09}"
    room = _MAX_NAME - len(moment)
    return f"vmbus-{tag}".encode()[:room].decode(errors="ignore") + moment


async def save(disks: Disks, name: str) -> None:
    """Save all disks as ``name``, or none of them. Raises :class:`SnapshotFailed`."""
    made: dict[str, SnapshotDisk] = {}

    def work(each: str) -> None:
        disks[each].save_snapshot(name)
        made[each] = disks[each]

    try:
        if failures := await _each_named(disks, work):
            raise SnapshotFailed(_told(failures, "cannot be saved"))
    except BaseException as error:
        failures = await _each(made, lambda disk: disk.delete_snapshot(name))
        if (failed := _with(error, _left(failures, name))) is error:
            raise
        raise failed from error


async def holding(disks: Disks, names: Sequence[str]) -> dict[str, list[str]]:
    """Return, for each name, the disks that have a snapshot of that name. A disk that cannot be read has none."""
    found, failures = await _read(disks)
    for each, why in failures.items():
        _logger.warning("%s: %s", each, why)
    return {name: [each for each, sizes in found.items() if name in sizes] for name in names}


async def check(disks: Disks, name: str, tag: str, *, without_disks: bool) -> Disks:
    """Return the disks that ``name`` is put back on. Raises :class:`SnapshotFailed` if one of them does not fit.

    ``without_disks``: those that have no such snapshot stay as they are.
    """
    found, failures = await _read(disks)
    if failures:
        raise SnapshotFailed(f"{_told(failures, 'cannot be checked')}; nothing was changed")
    missing = [each for each in disks if name not in found[each]]
    if missing and not without_disks:
        raise SnapshotFailed(
            f"snapshot {tag} does not hold the disk {', '.join(missing)}: the disk was added or replaced since, or "
            "the snapshot was made without it. Nothing was changed; remove the disk, or add --without-disks and "
            "put it back yourself while the guest is stopped"
        )
    for each, sizes in found.items():
        if name in sizes and sizes[name] != disks[each].size:
            raise SnapshotFailed(
                f"the disk {each} was resized since snapshot {tag}: it has {disks[each].size} bytes, and had "
                f"{sizes[name]}; nothing was changed"
            )
    return {each: disk for each, disk in disks.items() if each not in missing}


@contextlib.asynccontextmanager
async def put_back(disks: Disks, name: str) -> AsyncIterator[None]:
    """Put all disks back to ``name`` for the work that follows; if that fails, they are as they were before.

    Raises :class:`NotBegun` if they cannot be put back. If a disk is not as before, the exception says so, and its
    ``disks_stay`` is False.
    """
    kept = f"vmbus-before@{secrets.token_hex(8)}"
    done: dict[str, SnapshotDisk] = {}

    def work(each: str) -> None:
        disks[each].load_snapshot(name, keep=kept)
        done[each] = disks[each]

    def undo(disk: SnapshotDisk) -> None:
        disk.load_snapshot(kept)
        disk.delete_snapshot(kept)

    try:
        if failures := await _each_named(disks, work):
            raise NotBegun(_told(failures, "cannot be put back"))
        yield
    except BaseException as error:
        found, unknown = await _read(disks)  # one that failed may have changed nevertheless
        changed = {each: disks[each] for each in disks if each in done or kept in found.get(each, ())}
        failures = await _each(changed, undo) | {
            each: why for each, why in unknown.items() if each not in changed
        }
        failed = _with(error, [_told(failures, f"is not as before, which is in its snapshot {kept}")])
        if failed is error:
            raise
        if isinstance(failed, SnapshotFailed):
            failed.disks_stay = False
        raise failed from error
    failures = await _each(disks, lambda disk: disk.delete_snapshot(kept))
    for message in _left(failures, kept):
        _logger.warning("%s", message)


async def delete(disks: Disks, names: Sequence[str], tag: str) -> None:
    """Delete all of ``names`` from every disk. Raises :class:`SnapshotFailed`."""
    found, failures = await _read(disks)

    def work(each: str) -> None:
        for name in names:
            if name in found[each]:
                disks[each].delete_snapshot(name)

    concerned = {each: disks[each] for each, sizes in found.items() if any(name in sizes for name in names)}
    failures |= await _each_named(concerned, work)
    if failures:
        raise SnapshotFailed(
            f"{_told(failures, f'still has its part of snapshot {tag}')}; the snapshot stays: try again"
        )


async def _read(disks: Disks) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Return the snapshots of each disk, name → bytes of the disk then, and why those of some cannot be read."""
    found: dict[str, dict[str, int]] = {}

    def work(each: str) -> None:
        found[each] = {one.name: one.size for one in disks[each].snapshots()}

    failures = await _each_named(disks, work)
    return {each: found[each] for each in disks if each in found}, failures


async def _each(disks: Disks, work: Callable[[SnapshotDisk], None]) -> dict[str, str]:
    """Call ``work`` for all disks at the same time; return why it failed, by disk."""
    return await _each_named(disks, lambda each: work(disks[each]))


async def _each_named(disks: Disks, work: Callable[[str], None]) -> dict[str, str]:
    tasks = {each: asyncio.ensure_future(asyncio.to_thread(work, each)) for each in disks}
    if tasks:
        # To its end even if this is cancelled: nobody could say afterwards which disks were changed.
        waiting = asyncio.ensure_future(asyncio.wait(tasks.values()))
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await waiting
            raise
    return {each: str(error) for each, task in tasks.items() if (error := _failed(each, task)) is not None}


def _failed(each: str, task: asyncio.Future[None]) -> BaseException | None:
    error = task.exception()
    if error is not None and not isinstance(error, VmbusError | OSError):
        _logger.error("internal error at the disk %s; please report this", each, exc_info=error)
    return error


def _told(failures: Mapping[str, str], what: str) -> str:
    return ", ".join(f"the disk {each} {what}: {why}" for each, why in failures.items())


def _left(failures: Mapping[str, str], name: str) -> list[str]:
    return [f"the disk {each} still has the snapshot {name}: {why}" for each, why in failures.items()]


def _with(error: BaseException, more: Sequence[str]) -> BaseException:
    """Return ``error`` with more to say; what cannot say it (the emulator ends) has it in the log."""
    added = [each for each in more if each]
    if not added:
        return error
    if isinstance(error, SnapshotFailed):
        return type(error)("; ".join([str(error), *added]))
    for each in added:
        _logger.error("%s", each)
    return error
