"""A guest under load for migrations: an echo client checks every byte, heartbeats go on, nothing may be refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmbus.machine.host import Host
from vmbus.machine.migration.drive import Outcome, receive
from vmbus.saving import NtStatus

from tests.guest.harness import LOADED_MODULES, Booted
from tests.guest.test_boot import complaints
from tests.migration.journey import Journey, journey
from tests.migration.test_live import more_beats

LIMIT = 180
ECHOING = "echo started; while echo_client --count 10000 --generate 5000 --fill 20; do :; done; echo failed"

Program = Callable[[str], Path]


@contextlib.asynccontextmanager
async def under_load(
    folder: Path,
    program: Program,
    *,
    kernel: str = "debian-6.12",
    smp: int = 1,
    side_channel: str = "",
    extra: Sequence[str] = (),
    reachable: Sequence[Path] = (),
    image: bool = False,
    compressed: bool = False,
    echoing: str = ECHOING,
) -> AsyncIterator[Journey]:
    """A guest whose echo client checks every byte; ``side_channel`` is a command that runs next to it."""
    # uio_hv_generic of 6.1 refuses a channel that is signalled by hypercall.
    echo = f"echo,monitor={'on' if kernel == 'debian-6.1' else 'off'}"
    async with journey(
        folder,
        kernel=kernel,
        smp=smp,
        devices=("heartbeat,interval=0.05", "shutdown", echo),
        add=[(program("echo_client"), "/bin/echo_client")],
        load=(*LOADED_MODULES, "uio_hv_generic"),
        command=[f"{side_channel} {echoing}"],
        extra=extra,
        reachable=reachable,
        snapshots=image,
        compressed=compressed,
    ) as guest:
        guest.here.failure_word = b"failed"
        await guest.here.says("started")
        await more_beats(guest)
        yield guest


async def guest_resumed(guest: Journey) -> None:
    """The load is still there, and nothing was lost, changed or refused on the way."""
    await more_beats(guest)
    requests = guest.device("echo").status()["requests"]
    reports = guest.here.output.count(b"{")
    await guest.here.until(lambda: guest.here.output.count(b"{") > reports + 1, "two more reports")
    # Reports may have been on their way for a while.
    await guest.here.until(lambda: guest.device("echo").status()["requests"] > requests, "more requests")
    text = guest.here.output.decode()
    assert "failed" not in text, text
    for line in text.splitlines()[1:-1]:  # the last may not be complete
        json.loads(line)
    assert guest.device("heartbeat").status()["odd_answers"] == 0
    found = guest.here.status()
    assert all(channel["refusals"] == {} for channel in found["channels"])
    assert all(channel["io"]["refusals"] == {} for channel in found["channels"])
    assert found["bus"]["refusals"] == {}
    assert complaints(guest.here.console()) == []


def went_well(outcome: Outcome) -> None:
    assert outcome.report.statuses[-1] == "completed"
    assert len(outcome.report.channels) == 3
    for channel in outcome.report.channels:
        assert channel.statuses == (NtStatus.STATUS_SUCCESS,)


async def put(
    host: Host, capabilities: Mapping[str, bool], parameters: Mapping[str, Any] | None = None
) -> None:
    if capabilities:
        wanted = [{"capability": name, "state": state} for name, state in capabilities.items()]
        await host.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
    if parameters:
        await host.qmp.execute("migrate-set-parameters", dict(parameters))


async def place(
    guest: Journey,
    capabilities: Mapping[str, bool],
    parameters: Mapping[str, Any] | None = None,
    *,
    memory_of: Booted | None = None,
) -> Booted:
    """Somewhere to go to, not listening yet; the same is set there and here."""
    there = await guest.begin(replace(guest.options, incoming=True), memory_of=memory_of)
    for station in (guest.here, there):
        await put(station.host, capabilities, parameters)
    return there


async def tcp_uri(there: Booted) -> str:
    """Have it listen on a port that is free."""
    await receive(there.host.migration, "tcp:127.0.0.1:0")
    address = (await there.host.qmp.execute("query-migrate"))["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A target that takes all that comes, and says nothing."""
    while await reader.read(1 << 20):
        pass
    writer.close()
