"""The hosts' part of a move: a guest goes from one QEMU to another one, whose hosts are in this process."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from pathlib import Path

from vmbus.errors import QemuError, VmbusError, system_reason
from vmbus.machine.host import Host
from vmbus.machine.migration.configuration import leave_memory
from vmbus.machine.migration.drive import MigrationFailed, Outcome, Progress, arrived, migrate, receive
from vmbus.machine.migration.side_channel import CarrierAddress
from vmbus.machine.migration.state_machine import Phase

_logger = logging.getLogger(__name__)


async def transfer(
    source: Host,
    target: Host,
    folder: Path,
    *,
    share_memory: bool = False,
    progress: Progress | None = None,
    timeout: float = 600.0,
) -> Outcome:
    """Live-migrate from ``source`` to ``target``, whose QEMU waits for a guest and can use ``folder``.

    ``share_memory``: both have the same memory file, which is not copied. Raises
    :class:`~vmbus.machine.migration.drive.MigrationFailed`; :func:`stay` follows when the target has been ended.
    """
    uri = f"unix:{folder}/migration.sock"
    if share_memory:
        await leave_memory(source.qmp, True)
        await leave_memory(target.qmp, True)
    carrier = None
    if source.facts.dbus_address is None:
        carrier = CarrierAddress("unix", folder / "carrier.sock")
    buffer_size = source.migration.buffer_size
    await receive(target.migration, uri, carrier=carrier)
    outcome = await migrate(source.migration, uri, carrier=carrier, progress=progress, timeout=timeout)
    await arrived(target.migration, timeout)
    target.migration.buffer_size = buffer_size
    return outcome


async def stay(source: Host, target: Host, error: BaseException, *, share_memory: bool) -> None:
    """Go on at ``source`` after ``error`` of :func:`transfer`; ``target`` has been ended.

    Raises :class:`~vmbus.machine.migration.drive.MigrationFailed` with the target's reason, if it refused the guest.
    """
    if share_memory:
        await copy_memory_again(source)
    if source.migration.phase is Phase.LEFT:  # the source still has all of the guest
        await source.migration.take_back()
    if (why := target.migration.load_refused) and isinstance(error, MigrationFailed):
        raise MigrationFailed(f"{why}; the guest continues here") from error


async def ended(work: Awaitable[None]) -> None:
    """Await ``work``, which ends what a move leaves behind, and log its failure: the guest is served all the same."""
    try:
        await work
    except Exception as error:
        reason = system_reason(error) if isinstance(error, OSError) else error
        unexpected = not isinstance(error, OSError | VmbusError)
        _logger.warning("not all that a move leaves behind was removed: %s", reason, exc_info=unexpected)


async def copy_memory_again(host: Host) -> None:
    """Have later migrations of this QEMU copy memory; where that fails, the guest does not depend on it."""
    try:
        await leave_memory(host.qmp, False)
    except QemuError as error:
        _logger.warning("QEMU would leave guest memory out of a migration or snapshot: %s", error)
