"""What an emulator finds in a QEMU that another emulator served before, and what it does then.

=======================  =======================================================================================
found                    then
=======================  =======================================================================================
a migration under way    is cancelled: the state that belongs to it has ended with its emulator. In
                         ``pre-switchover`` QEMU would wait for ever
a guest that has left    it is not served: the target has it
a guest that uses its    it is taken over, if its emulator kept a journal (:mod:`vmbus.machine.journal`)
Hyper-V host

the same, and no journal it waits: its next instruction that needs the host is not answered. The state of its SynIC
                         and channels has ended with its emulator. The guest can be reset
any other guest          is served: it boots, or waits for its first emulator
=======================  =======================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from vmbus.errors import GatewayError, QemuError, UserError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.journal.reading import Contents, JournalRefused
from vmbus.machine.journal.recovery import RecoveredGuest, contents_of, device_lines, recover
from vmbus.machine.qemu.qmp import Qmp
from vmbus.wire.gateway import GuestState
from vmbus.wire.journal import MAGIC

_logger = logging.getLogger(__name__)

_TIMEOUT = 30.0
"""Seconds that QEMU may take to cancel a migration, or to reset the machine."""
_SETUP_TIMEOUT = 5.0
"""Seconds to wait for the end of ``setup`` before a migration is cancelled."""
_POLL = 0.02
"""Seconds between two ``query-migrate``."""
_OUTGOING = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")


class GuestLost(UserError):
    """A guest that cannot be served: its state is elsewhere, or lost. The guest was not changed."""


class GuestLeft(GuestLost):
    """A guest that runs elsewhere, or was saved into a file."""


async def end_migration(qmp: Qmp) -> bool:
    """Cancel a migration that began under another emulator; return whether there was one."""
    if (await qmp.execute("query-status"))["status"] == "inmigrate":
        return False
    found = cancelled = False
    begun = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(_TIMEOUT):
            while (status := (await qmp.execute("query-migrate")).get("status")) in _OUTGOING:
                if not found:
                    found = True
                    _logger.warning(
                        "a migration of this guest is under way (%s), and the emulator that took part in it has "
                        "ended: the migration is cancelled",
                        status,
                    )
                in_setup = status == "setup" and asyncio.get_running_loop().time() - begun < _SETUP_TIMEOUT
                if not cancelled and not in_setup:  # cancelled in setup, QEMU may hang until the target ends
                    cancelled = True
                    with contextlib.suppress(QemuError):  # it ends at this moment
                        await qmp.execute("migrate_cancel")
                await asyncio.sleep(_POLL)
    except TimeoutError:
        raise QemuError(
            f"QEMU has not ended the migration of this guest within {_TIMEOUT:g} s; end its target, and try again"
        ) from None
    return found


async def guest_is_here(qmp: Qmp) -> bool:
    """Return whether this QEMU has a guest, rather than waiting for one that runs elsewhere."""
    return bool((await qmp.execute("query-status"))["status"] != "inmigrate")


def find_guest(gateway: Gateway, *, takeover: bool) -> RecoveredGuest | JournalRefused | None:
    """Return what a journal has of the guest, or why it has nothing; ``None`` for a guest that needs none.

    A guest that was reset since its emulator was killed needs none: it boots. With ``takeover`` an emulator may have
    been detached that still works on the guest.
    """
    if gateway.guest is not GuestState.ENGAGED:
        return None
    try:
        with contextlib.closing(gateway.journal_memory()) as memory:
            found = recover(memory)
    except GatewayError as error:  # it is of an older release
        return JournalRefused("empty", str(error))
    except JournalRefused as error:
        return error
    if found.resets == gateway.resets:
        if takeover:
            return JournalRefused(
                "detached",
                "the emulator that was detached may still work; end it, and attach without --take-over",
            )
        return found
    _logger.info("the machine was reset after the emulator of its guest was killed")
    gateway.forget_requests()
    gateway.guest = GuestState.FREE
    return None


def devices_of(gateway: Gateway) -> Sequence[str] | None:
    """Return the lines of the devices that the emulator of before had; ``None`` if it has not left any."""
    try:
        with contextlib.closing(gateway.journal_memory()) as memory:
            return device_lines(memory)
    except (GatewayError, JournalRefused) as error:
        _logger.info("no journal says which devices this guest has: %s", error)
        return None


def journal_of(gateway: Gateway) -> Contents | None:
    """Return what the process of before has left in the journal; ``None`` if that cannot be read."""
    with contextlib.closing(gateway.journal_memory()) as memory:
        try:
            return contents_of(memory)
        except JournalRefused as error:
            _logger.info("the journal begins anew: %s", error)
            return None


def retire_journal(gateway: Gateway) -> None:
    """Make the journal of an emulator of before invalid: this one keeps none."""
    try:
        memory = gateway.journal_memory()
    except GatewayError:  # a gateway of an older release has none
        return
    with contextlib.closing(memory):
        if any(memory[: len(MAGIC)]):
            memory[: len(MAGIC)] = bytes(len(MAGIC))


async def check_guest(
    qmp: Qmp, gateway: Gateway, *, reset: bool, found: RecoveredGuest | JournalRefused | None = None
) -> None:
    """Raise :class:`GuestLost` for a guest that cannot be served; with ``reset``, only for one that has left.

    ``found``: of :func:`find_guest`.
    """
    status = (await qmp.execute("query-status"))["status"]
    if gateway.guest is GuestState.LEFT or status == "postmigrate":
        raise GuestLeft(
            "the guest of this QEMU has left: it was migrated, or saved into a file, and must not run twice. End "
            "this QEMU"
        )
    if gateway.guest is GuestState.ENGAGED and not reset and not isinstance(found, RecoveredGuest):
        why = (
            f" (its journal is of no use: {found.detail})"
            if found is not None and found.reason != "empty"
            else ""
        )
        raise GuestLost(
            "the guest of this QEMU uses its Hyper-V host already, and the state of that host (SynIC, channels) was "
            f"known only to the emulator that served it and has ended{why}. The guest was not changed and waits: "
            "reset it with `vmbus attach --reset`, or end this QEMU and load a snapshot"
        )


async def reset_guest(qmp: Qmp, gateway: Gateway) -> bool:
    """Reset the machine and leave it stopped; return whether it ran before.

    Call it before the gateway is activated: the old guest must not run on.
    """
    ran = bool((await qmp.execute("query-status"))["running"])
    await qmp.execute("stop")
    await qmp.execute("system_reset")
    async with asyncio.timeout(_TIMEOUT), contextlib.aclosing(qmp.events()) as events:
        async for name, _ in events:
            if name == "RESET":
                break
    gateway.forget_requests()
    gateway.guest = GuestState.FREE
    return ran
