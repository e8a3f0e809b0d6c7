"""Removes a device with parts from a running guest: its offer is rescinded when the guest has finished with it.

Source: docs/protocol/messages.md#rescind-and-release.

    whole --detach parts--> without parts --the guest has finished--> rescinded --RELID_RELEASED--> gone
                                '--it does not, or it moves--> without parts, still offered and served

From the RESCIND on the host does not access the rings, and Linux does not read them: it waits for ever for a SCSI
command whose answer it has not read by then, and for each one that it sends afterwards. So there may be none, and
what the guest still has to do is waited for:

- it has looked for the parts (:class:`~vmbus.devices.parts.NoticesRemoval`);
- it has read everything in the rings, messages included, and waits for nothing;
- it has left the device alone since, for longer than it did between two requests before: a machine with much to do
  makes its guest slow.

A guest that is stopped can do nothing of that, so the time of a stop does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from vmbus.bus.channel.channel import Channel
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.errors import UserError

QUIET_PERIOD = 1.0
"""Seconds without a request after which the guest has finished, at least."""

GAPS = 4
"""Times that the longest pause between two requests must have passed without one."""

UNNOTICED_PERIOD = 10.0
"""Seconds without a request after which a guest has finished that did not look for the parts: not all guests do."""

FINISH_TIMEOUT = 60.0
"""Seconds to wait for the guest to finish."""

RELEASE_TIMEOUT = 30.0
"""Seconds to wait for the guest to release the channel of a device that was rescinded."""

_POLL = 0.02


class RemovingBus(Protocol):
    """The part of :class:`~vmbus.bus.server.Bus` that is used here."""

    @property
    def channels(self) -> tuple[Channel, ...]:
        """All channels, revoked ones that the guest has not released included."""

    @property
    def messages_waiting(self) -> int:
        """Messages that wait until the guest has taken those before them."""


class RemovingHost(Protocol):
    """The part of :class:`~vmbus.machine.host.Host` that is used here."""

    @property
    def bus(self) -> RemovingBus:
        """The bus of the guest."""

    @property
    def stopped(self) -> bool:
        """Whether the guest is stopped."""


class Quiet:
    """For how long a guest has left a device alone; ``now`` is in seconds of any clock."""

    def __init__(self, now: float) -> None:
        self._since = self._seen_at = now
        self._longest_gap = 0.0
        self._packets = -1

    def look(self, now: float, packets: int, *, at_rest: bool, stopped: bool) -> None:
        """Note what is seen: ``packets`` taken in total, and whether nothing of the guest is under way."""
        if stopped:
            self._since += now - self._seen_at
        elif packets != self._packets or not at_rest:
            if self._packets >= 0:
                self._longest_gap = max(self._longest_gap, now - self._since)
            self._since, self._packets = now, packets
        self._seen_at = now

    def lasts(self, *, noticed: bool) -> bool:
        """Return whether the guest has finished."""
        needed = QUIET_PERIOD if noticed else UNNOTICED_PERIOD
        return self._seen_at - self._since >= max(needed, GAPS * self._longest_gap)


async def guest_finished(
    host: RemovingHost,
    name: str,
    channel: Channel,
    io: ChannelIo,
    *,
    busy: Callable[[], bool],
    noticed: Callable[[], bool],
) -> None:
    """Wait until the guest has finished with the device ``name``, of which all parts are detached.

    ``channel``: its primary channel, ``io``: the host's end of it. ``busy``: whether requests are outstanding,
    ``noticed``: whether the guest has looked for the parts. When this returns, nothing is in the rings of the device:
    rescind it without waiting for anything else.

    Raises :class:`~vmbus.errors.UserError` after :data:`FINISH_TIMEOUT` seconds.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + FINISH_TIMEOUT
    quiet = Quiet(loop.time())
    while True:
        stopped = host.stopped
        reports = [each.status() for each in (io, *io.subchannels)]
        at_rest = not busy() and not host.bus.messages_waiting and all(map(_at_rest, reports))
        packets = sum(each["packets_in"] for each in reports)
        quiet.look(loop.time(), packets, at_rest=at_rest, stopped=stopped)
        if not channel.is_open or (not stopped and at_rest and quiet.lasts(noticed=noticed())):
            return
        if loop.time() >= end:
            reason = "is stopped, so resume it (`vmbus cont`)" if stopped else "still uses it"
            raise UserError(
                f"{name} is without its disks, but it is still offered: the guest {reason}. Linux would wait for "
                f"ever for a request that is in a ring when its channel is rescinded. Remove {name} again later, or "
                "do not wait for the guest (--force)"
            )
        await asyncio.sleep(_POLL)


def _at_rest(report: dict[str, object]) -> bool:
    """Return whether nothing is under way at one end of a channel, and nothing is in its rings."""
    if report["state"] in ("closed", "failed"):
        return True
    rings = report.get("rings")
    filled = [each["fill"] for each in rings.values()] if isinstance(rings, dict) else []
    return not any((report["owed"], report["backlog"], *filled))


async def guest_released(host: RemovingHost, channel: Channel) -> bool:
    """Wait until the guest has released ``channel``, which was rescinded; return whether it has.

    A guest that is stopped, or does not release it within :data:`RELEASE_TIMEOUT` seconds, keeps the channel id.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + RELEASE_TIMEOUT
    while channel in host.bus.channels:
        if host.stopped or loop.time() >= end:
            return False
        await asyncio.sleep(_POLL)
    return True
