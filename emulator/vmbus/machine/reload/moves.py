"""A move of a guest that a worker serves: its keeper starts and ends the QEMUs, the worker has both hosts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vmbus.bus.io.device import Device
from vmbus.errors import system_reason
from vmbus.machine.host import Host
from vmbus.machine.migration.alone import alone
from vmbus.machine.migration.drive import MigrationFailed, Outcome
from vmbus.machine.moving import copy_memory_again, ended, stay, transfer
from vmbus.machine.signals import finished

_TIMEOUT = 600.0


class KeptMachines(Protocol):
    """The keeper's QEMUs, as a worker uses them; :class:`~vmbus.machine.reload.keeper.Kept`."""

    async def open_machine(self, *, share_memory: bool) -> tuple[Path, Path]:
        """Start a QEMU that waits for the guest; return its folder and its QMP socket."""

    async def take_machine(self) -> None:
        """End the guest's QEMU: it has moved to that one."""

    async def discard_machine(self) -> None:
        """End that one."""


class Mover:
    """Moves the guest of a worker. ``make_devices`` makes devices from their lines; ``served``: replaces the host."""

    def __init__(
        self,
        machines: KeptMachines,
        make_devices: Callable[[Sequence[str]], Sequence[Device]],
        served: Callable[[Host], None],
    ) -> None:
        self._machines = machines
        self._make_devices = make_devices
        self._served = served

    async def asked(self, host: Host, request: Mapping[str, Any]) -> object:
        """Answer the control socket's ``move``."""
        share = request.get("share_memory") is True
        timeout = float(request.get("timeout", _TIMEOUT))
        with host.migration.driven_here(), alone(host.migration, "vmbus migrate", MigrationFailed):
            if "save_buffer" in request:
                host.migration.buffer_size = int(request["save_buffer"])
            try:
                outcome = await self._move(host, share, timeout)
            except OSError as error:
                raise MigrationFailed(f"the move failed: {system_reason(error)}") from error
        return outcome.as_dict()

    async def _move(self, source: Host, share: bool, timeout: float) -> Outcome:
        lines = [line for attached in source.devices for line in attached.device.lines()]
        devices = await asyncio.to_thread(self._make_devices, lines)
        target: Host | None = None
        try:
            folder, monitor = await self._machines.open_machine(share_memory=share)
            target = await Host.attach(monitor, devices, source.options)
            outcome = await transfer(source, target, folder, share_memory=share, timeout=timeout)
        except BaseException as error:
            await finished(ended(self._give_up(target, devices)))
            if target is not None:
                await stay(source, target, error, share_memory=share)
            raise
        self._served(target)
        if share:
            await copy_memory_again(target)
        await finished(ended(self._leave(source)))
        return outcome

    async def _give_up(self, target: Host | None, devices: Sequence[Device]) -> None:
        async with contextlib.AsyncExitStack() as steps:  # the last one first, and each also if another fails
            for device in devices:
                if not device.was_started:  # its images are open, and no host closes them
                    steps.callback(device.stop)
            if target is not None:
                steps.push_async_callback(target.close)
            steps.push_async_callback(self._machines.discard_machine)

    async def _leave(self, source: Host) -> None:
        async with contextlib.AsyncExitStack() as steps:
            steps.push_async_callback(source.close)
            steps.push_async_callback(self._machines.take_machine)
