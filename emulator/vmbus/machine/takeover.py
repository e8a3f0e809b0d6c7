"""What an emulator finds in a QEMU that another one served before, and what it may do then.

=======================  =======================================================================================
found                    then
=======================  =======================================================================================
a migration under way    is cancelled: what its emulator wrote and knew, nobody can send any more. In
                         ``pre-switchover`` QEMU would wait for ever
a guest that has left    nobody may serve it: the target does
a guest that has set     it is held: its next instruction that needs its host waits. The channels and the SynIC
up its Hyper-V host      were known to the emulator that is gone. It can be reset
anything else            is served: a guest that boots, or waits for its first emulator
=======================  =======================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from vmbus.errors import QemuError, UserError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.qemu.qmp import Qmp
from vmbus.wire.gateway import GuestState

_logger = logging.getLogger(__name__)

_LIMIT = 30.0
"""Seconds that QEMU may take for a cancellation, or a reset."""
_POLL = 0.02
_OUTGOING = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")


class GuestLost(UserError):
    """The guest cannot be served: its state is elsewhere, or nowhere. It was not touched."""


async def end_migration(qmp: Qmp) -> bool:
    """Cancel a migration that another emulator prepared for. Whether there was one."""
    if (await qmp.execute("query-status"))["status"] == "inmigrate":
        return False
    found = False
    async with asyncio.timeout(_LIMIT):
        while (status := (await qmp.execute("query-migrate")).get("status")) in _OUTGOING:
            if not found:
                found = True
                _logger.warning(
                    "a migration of this guest is under way (%s), and the emulator that prepared for it is gone: "
                    "it is cancelled",
                    status,
                )
                with contextlib.suppress(QemuError):  # it ends in this moment
                    await qmp.execute("migrate_cancel")
            await asyncio.sleep(_POLL)
    return found


async def check_guest(qmp: Qmp, gateway: Gateway, *, reset: bool) -> None:
    """Raises :class:`GuestLost` for a guest that this emulator cannot serve; with ``reset``, only one that left."""
    status = (await qmp.execute("query-status"))["status"]
    if gateway.guest is GuestState.LEFT or status == "postmigrate":
        raise GuestLost(
            "the guest of this QEMU has left: it was migrated, or saved into a file. Serving it here too would let "
            "it live twice; end this QEMU"
        )
    if gateway.guest is GuestState.ENGAGED and not reset:
        raise GuestLost(
            "the guest of this QEMU uses its Hyper-V host already, and what it has set up (SynIC, channels) was "
            "known only to the emulator that served it, which is gone. The guest was not touched and waits: reset "
            "it with `vmbus attach --reset`, or end this QEMU and load a snapshot"
        )


async def reset_guest(qmp: Qmp, gateway: Gateway) -> bool:
    """Reset the machine, and leave it stopped. Whether it ran before.

    To be called before the gateway is activated: the guest that there was must not go on for a moment.
    """
    ran = bool((await qmp.execute("query-status"))["running"])
    await qmp.execute("stop")
    await qmp.execute("system_reset")
    async with asyncio.timeout(_LIMIT), contextlib.aclosing(qmp.events()) as events:
        async for name, _ in events:
            if name == "RESET":
                break
    gateway.forget_requests()
    gateway.guest = GuestState.FREE
    return ran
