"""A host with its control socket: what ``vmbus run`` and ``vmbus attach`` do once they are attached."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from vmbus import __version__
from vmbus.machine import signals
from vmbus.machine.control import ControlServer, Handler
from vmbus.machine.host import ExitReason, Host
from vmbus.machine.reload.keeper import Keeper, Kept, Machines
from vmbus.machine.reload.link import Link
from vmbus.machine.reload.supervisor import SupervisedMachines

HostCommand = Callable[[Host, Mapping[str, Any]], Awaitable[object]]
"""A command of the control socket, called with the host and the request."""


class Served:
    """Serves ``host`` until its QEMU ends; answers on ``directory/control.sock`` meanwhile."""

    def __init__(
        self,
        host: Host,
        directory: Path,
        commands: Mapping[str, HostCommand] | None = None,
        *,
        kept: Link | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        """``commands``: further commands of the control socket.

        ``kept``, ``listener``: of a worker: the link to its keeper, and the control socket that it takes over.
        """
        self.host = host
        self.directory = directory
        self.machines: Machines | None = None
        """Who starts and ends QEMUs for this guest, for workers; ``None``: not this process."""
        self.handlers: dict[str, Handler] = {"status": self._status, "stop": self._stop}
        for name, command in (commands or {}).items():
            self.add_command(name, command)
        self._control = ControlServer(directory / "control.sock", _Commands(self), listener)
        self.kept = None if kept is None else Kept(self, kept)
        self._keeper = Keeper(self)
        self.handlers["reload"] = (self.kept or self._keeper).reload
        self._left: asyncio.Task[None] | None = None

    def add_command(self, name: str, command: HostCommand) -> None:
        """Add a command to the control socket."""

        async def answer(request: Mapping[str, Any]) -> object:
            return await command(self.host, request)

        self.handlers[name] = answer

    def replace(self, host: Host) -> None:
        """Serve ``host`` from now on: the guest has moved there."""
        old, self.host = self.host, host
        host.events.takeovers += old.events.takeovers  # of this service, wherever its guest is
        old.stop()

    async def supervise(self, machines: SupervisedMachines) -> None:
        """Let another process serve the guest, and replace it whenever it is killed; call it after :meth:`start`.

        Raises :class:`~vmbus.errors.UserError`: then this process serves it.
        """
        await self._keeper.supervise(machines)

    async def start(self) -> None:
        """Open the control socket."""
        await self._control.start()

    async def stop_listening(self) -> None:
        """Close the control socket, and end the worker that serves the guest, if one does."""
        await self._control.stop()
        await self._keeper.close()

    async def close(self) -> None:
        """Do that, and close the host."""
        await self.stop_listening()
        await self.host.close()

    async def serve(self) -> ExitReason:
        """Serve until QEMU ends, the control socket asks to stop, or one of :data:`signals.SIGNALS` comes.

        In the process that the user started that includes the service of workers; a worker returns when the next one
        has the guest.
        """
        with signals.handled(lambda number: self.stop()):
            while True:
                host = self.host
                exit_reason = await host.serve()
                if self._left is not None:
                    await self._control.answered()
                    if self.kept is None:
                        return await self._keeper.exit_reason()
                    return exit_reason
                if host is self.host:
                    if self.kept is not None:
                        await self.kept.tell_end(exit_reason)
                    return exit_reason

    def stop(self) -> None:
        """Make :meth:`serve` return, whoever serves the guest."""
        if self._keeper.follows:
            self._keeper.tell_to_end()
        else:
            self.host.stop()

    # --- reloads ---

    def hold(self) -> None:
        """Accept no more commands until :meth:`accept` or :meth:`leave`."""
        self._control.hold()

    async def accept(self) -> None:
        """Accept commands again."""
        await self._control.start()

    def listener(self) -> int:
        """Return the descriptor of the control socket."""
        return self._control.fileno()

    def leave(self) -> None:
        """End the service: another process has taken the guest over."""
        self._control.leave()
        self._left = asyncio.ensure_future(self.host.close())
        self.host.stop()

    async def _status(self, request: Mapping[str, Any]) -> object:
        return status(self.host, self.directory.name)

    async def _stop(self, request: Mapping[str, Any]) -> object:
        self.stop()
        return {}


class _Commands(Mapping[str, Handler]):
    """The commands of a control socket: those of ``served``, then those of the devices that it has at that time."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def _found(self) -> dict[str, Handler]:
        commands: dict[str, Handler] = {}
        for attached in reversed(self._served.host.devices):
            commands |= attached.device.control_commands()
        return commands | self._served.handlers

    def __getitem__(self, name: str) -> Handler:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


def status(host: Host, name: str) -> dict[str, Any]:
    """Return everything that ``vmbus status --json`` shows."""
    ends: dict[tuple[str, int], dict[str, Any]] = {}
    for attached in host.devices:
        for index, io in enumerate((attached.io, *attached.io.subchannels)):
            ends[str(attached.channel.offer.instance_id), index] = {
                "device": attached.device.name,
                "io": io.status(),
                "details": {} if index else attached.device.status(),
            }
    bus = host.bus.status()  # after the devices: each end has counted by now what compiled code did for it
    channels = cast(list[dict[str, Any]], bus.pop("channels"))
    channels.sort(key=lambda channel: channel["relid"] or 0)
    for channel in channels:
        channel |= ends.get((str(channel["instance"]), channel["subchannel"]), {})
    return {
        "name": name,
        "emulator": {"version": __version__, **process_figures(), "uptime": time.monotonic() - host.started},
        "qemu": {
            "pid": host.facts.pid,
            "version": host.facts.version,
            "machine": host.facts.machine,
            "memory": host.facts.ram_size,
        },
        "vcpus": max(host.facts.vcpus, host.gateway.vcpus),
        "traps": host.service.traps,
        "doorbells": host.service.doorbells,
        "posts": host.service.posts,
        "interrupts": host.interrupts.requests,
        "stopped_because": list(host.stopped_because),
        "problems": host.problems.sentences,
        "resets": host.events.resets,
        "takeovers": host.events.takeovers,
        "crashes": [str(report) for report in host.events.crashes],
        "migration": {
            "phase": host.migration.phase.value,
            "ready": host.migration.ready,
            "switchover": host.migration.switchover.value,
            "refusal": host.migration.report.refusal,
            "load_refused": host.migration.load_refused,
        },
        "partition": host.partition.status(),
        "bus": bus,
        "channels": channels,
    }


def process_figures() -> dict[str, Any]:
    """Return figures of this process: resident and peak memory in bytes, CPU seconds, open descriptors."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures: dict[str, Any] = {
        "pid": os.getpid(),
        "peak_memory": usage.ru_maxrss * 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    with suppress(FileNotFoundError):  # no /proc
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        figures["memory"] = pages * resource.getpagesize()
        figures["descriptors"] = len(list(Path("/proc/self/fd").iterdir()))
    return figures
