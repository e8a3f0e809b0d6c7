"""The process that serves a guest hands it to another one, which has told that it is ready.

    here                                                  there (:mod:`vmbus.machine.reload.successor`)
    guest: QEMU's facts, options, device lines ──────────→ makes the devices, which opens their images
                                               ←────────── prepared
    stand still: gateway, QMP, channels, bus, partition
    state, descriptors ──────────────────────────────────→ restores the state, paused
                                               ←────────── accepted
    release images
    go ──────────────────────────────────────────────────→ claims images
                                               ←────────── claimed
    give the gateway
    yours ───────────────────────────────────────────────→ closes the connection, and serves

Until ``yours`` is read there the guest belongs to this process, which serves it again after any failure: a process
that ends without having read it resets the connection, and one that has read it closes it. QEMU is asked for nothing;
its guest runs on until it needs the host.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from vmbus.errors import VmbusError, system_reason
from vmbus.machine.host import Host
from vmbus.machine.migration.alone import alone
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.migration.switchover import SETTLE_TIMEOUT, check_all_can_leave
from vmbus.machine.reload.description import facts_values, options_values
from vmbus.machine.reload.figures import figures
from vmbus.machine.reload.link import ANSWER_TIMEOUT, Link, ReloadEnded, ReloadFailed
from vmbus.machine.signals import finished
from vmbus.wire.reload import MAX_DATA

_logger = logging.getLogger(__name__)

PREPARE_TIMEOUT = 60.0
"""Seconds that the other process may take to make its devices."""
CLAIM_TIMEOUT = 60.0
"""Seconds that it may take to lock the images, and to start what serves them."""


async def hand_over(
    host: Host,
    link: Link,
    ended: Callable[[], Awaitable[str]],
    values: Mapping[str, Any],
    descriptors: Sequence[int] = (),
) -> float:
    """Hand the guest to the process at ``link``; return for how many seconds nobody served it.

    ``ended`` ends that process, after ``link`` was closed, and returns how it ended. ``values``, ``descriptors``:
    what it gets besides. Raises :class:`~vmbus.machine.reload.link.ReloadFailed`; then ``host`` serves as before.
    """
    with alone(host.migration, "vmbus reload", ReloadFailed):
        try:
            check(host)
            lines = [line for attached in host.devices for line in attached.device.lines()]
            await link.tell(
                "guest",
                {
                    **values,
                    "facts": facts_values(host.facts),
                    "options": options_values(host.options),
                    "devices": lines,
                },
            )
            await link.hear("prepared", timeout=PREPARE_TIMEOUT)
            if not await host.tasks_done(ANSWER_TIMEOUT):
                raise ReloadFailed("QEMU does not answer a command in time; try again")
            check(host)
            return await Handover(host, link, ended, descriptors).run()
        except ReloadEnded:
            link.close()
            raise ReloadFailed(
                f"the new emulator did not take over: {await ended()}; its messages are in the output of the "
                "`vmbus run` or `vmbus attach` that has started this guest"
            ) from None
        except ReloadFailed:
            raise
        except VmbusError as error:
            raise ReloadFailed(str(error)) from error
        except OSError as error:
            raise ReloadFailed(f"this emulator cannot hand the guest over: {system_reason(error)}") from error
        finally:
            link.close()


def check(host: Host) -> None:
    """Raise :class:`~vmbus.machine.reload.link.ReloadFailed` if the guest cannot be handed over now."""
    if host.migration.phase is not Phase.IDLE:
        raise ReloadFailed(f"the guest is {host.migration.phase.value}: it cannot be reloaded now")
    if held := host.state.held_by_hand():
        raise ReloadFailed(
            f"channels are paused by hand ({', '.join(held)}): resume them first (`vmbus channel`)"
        )
    check_all_can_leave(host.state)
    if without := [attached.device.name for attached in host.devices if not attached.device.lines()]:
        raise ReloadFailed(f"devices that were made by code cannot be made again: {', '.join(without)}")


class Handover:
    """The part of a hand-over in which nobody serves the guest."""

    def __init__(
        self, host: Host, link: Link, ended: Callable[[], Awaitable[str]], more: Sequence[int]
    ) -> None:
        self._host = host
        self._link = link
        self._ended = ended
        self._more = more
        self._stopped_here = False
        """Whether the guest runs, and only its devices stand still."""

    async def run(self) -> float:
        """Hand the guest over; return the seconds until it was."""
        host, link = self._host, self._link
        begun = time.monotonic()
        host.leave_gateway()
        try:
            unread = await host.qmp.pause()
            running = self._stopped_here = not host.stopped  # after all events that were read
            await self._stand_still()
            await self._pass_on(unread, running=running)
            host.state.release_devices()
            await link.tell("go")
            await link.hear("claimed", timeout=CLAIM_TIMEOUT)
            host.give_gateway()
            await link.tell("yours")
        except BaseException:
            await finished(self._serve_again())
            raise
        still = time.monotonic() - begun
        try:  # who cancels this ends the service, and the guest may be there by now
            await link.taken()
        except Exception:
            await finished(self._serve_again())
            raise
        return still

    async def _stand_still(self) -> None:
        host = self._host
        host.state.pause_channels()
        if not await host.workers.settle(SETTLE_TIMEOUT):
            raise ReloadFailed(
                "a device's work did not end in time; `vmbus status` shows the disks that wait"
            )
        host.state.pause()
        await host.qtest.settled()

    async def _pass_on(self, unread: bytes, *, running: bool) -> None:
        host, link = self._host, self._link
        state = host.state.save(machine_stays=True, limit=MAX_DATA)
        await link.tell(
            "state",
            {
                "running": running,
                "stopped_at": host.clock.stopped_at or 0,
                "unread": unread.decode("latin-1"),
                "qmp": {"path": host.qmp.path, "pid": host.qmp.pid},
                "gateway_size": host.gateway.size,
                "figures": figures(host),
            },
            data=state.data,
            descriptors=[host.qmp.fileno(), host.qtest.fileno(), *host.gateway.descriptors(), *self._more],
        )
        await link.hear("accepted")

    async def _serve_again(self) -> None:
        """Go on as if nothing had been asked, when the other process has ended: it may have claimed images."""
        host = self._host
        self._link.close()
        try:
            await self._ended()
        except Exception:
            _logger.exception(
                "it is not certain that the new emulator has ended; the guest is served all the same"
            )
        host.take_gateway_back()
        if self._stopped_here:
            host.clock.resume()
        host.state.resume()
        if self._stopped_here:
            host.devices_resumed()
        host.begin_service()
        host.qmp.resume()
