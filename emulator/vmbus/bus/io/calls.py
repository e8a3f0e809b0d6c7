"""The hooks of a device that its channel calls outside of packets: what they raise costs this channel only.

    suspended --start--> started --event loop--> post_started --suspend--> suspended
                            '--------------------suspend-------------------^

A device is told once for each start that packets follow, and once that none do, as KMCL tells its devices
(EvtVmbChannelStarted, EvtVmbChannelPostStarted, EvtVmbChannelSuspend).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from vmbus.bus.io.hooks import DeviceHooks
from vmbus.errors import GuestError
from vmbus.ports import Timers

_logger = logging.getLogger(__name__)

Io = TypeVar("Io")


class DeviceCalls(Generic[Io]):
    """The calls for ``io``, one channel of ``device``; ``fail`` fails the channel with a reason and a detail."""

    def __init__(
        self, device: DeviceHooks[Io], io: Io, timers: Timers, fail: Callable[[str, str], None]
    ) -> None:
        self._device = device
        self._io = io
        self._timers = timers
        self._fail = fail
        self._started = False
        """Whether the device was told that packets follow, and not since that none do."""
        self._post_start_due = False

    def contain(self, hook: Callable[[Io], None]) -> None:
        """Call a hook; an exception fails the channel."""
        try:
            hook(self._io)
        except GuestError as error:
            self._fail(error.reason, error.detail)
        except Exception as error:  # noqa: BLE001 - a bug of a device must not end the process
            self.broken(error)

    def broken(self, error: Exception) -> None:
        """Fail the channel because of an error of the device."""
        _logger.error("%s: the device failed", self._device.name, exc_info=error)
        self._fail("device-error", repr(error))

    def start(self) -> None:
        """Have the device send (Started): packets follow."""
        self._started = True
        self.contain(self._device.started)

    def post_start_soon(self) -> None:
        """Tell the device, from the event loop, that packets are taken (PostStarted)."""
        self._post_start_due = True
        self._timers.call_soon(self._post_start)

    def _post_start(self) -> None:
        if self._post_start_due:
            self._post_start_due = False
            self.contain(self._device.post_started)

    def drop_post_start(self) -> None:
        """Do not do that any more: the channel has failed."""
        self._post_start_due = False

    def suspend(self) -> None:
        """Tell the device that no packet follows, unless it knows."""
        if self._started:
            self._started = self._post_start_due = False
            self.contain(self._device.suspended)
