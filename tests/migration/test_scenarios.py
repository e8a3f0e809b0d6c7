"""The ways out of a QEMU, and what may be set for them: through each of them a guest under load goes unharmed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emulator.machine.host import Host
from emulator.machine.migration import snapshots
from emulator.machine.migration.drive import MigrationFailed, Outcome, arrived, migrate, receive
from emulator.machine.migration.snapshots import SnapshotFailed
from emulator.saving import NtStatus
from tests.guest.harness import LOADED_MODULES, Booted
from tests.guest.test_boot import complaints
from tests.migration.journey import Journey, journey
from tests.migration.test_live import more_beats

pytestmark = pytest.mark.guest

LIMIT = 60
ECHOING = "echo started; while echo_client --count 10000 --generate 5000 --fill 20; do :; done; echo failed"

Program = Callable[[str], Path]


@contextlib.asynccontextmanager
async def under_load(
    folder: Path,
    program: Program,
    *,
    kernel: str = "debian-6.12",
    beside: str = "",
    extra: Sequence[str] = (),
    image: bool = False,
) -> AsyncIterator[Journey]:
    """A guest whose echo client checks every byte; ``beside`` is a command that runs next to it."""
    # uio_hv_generic of 6.1 refuses a channel that is signalled by hypercall.
    echo = f"echo,monitor={'on' if kernel == 'debian-6.1' else 'off'}"
    async with journey(
        folder,
        kernel=kernel,
        devices=("heartbeat,interval=0.05", "shutdown", echo),
        add=[(program("echo_client"), "/bin/echo_client")],
        load=(*LOADED_MODULES, "uio_hv_generic"),
        command=[f"{beside} {ECHOING}"],
        extra=extra,
        snapshots=image,
    ) as guest:
        await guest.here.says("started")
        await more_beats(guest)
        yield guest


async def goes_on(guest: Journey) -> None:
    """The load is still there, and nothing was lost, changed or refused on the way."""
    await more_beats(guest)
    requests = guest.device("echo").status()["requests"]
    reports = guest.here.output.count(b"{")
    await guest.here.until(lambda: guest.here.output.count(b"{") > reports + 1, "two more reports")
    assert guest.device("echo").status()["requests"] > requests
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
    assert outcome.departure.statuses[-1] == "completed"
    assert len(outcome.departure.channels) == 3
    for channel in outcome.departure.channels:
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
    guest: Journey, capabilities: Mapping[str, bool], parameters: Mapping[str, Any] | None = None
) -> Booted:
    """Somewhere to go to, not listening yet; the same is set there and here."""
    there = await guest.begin(replace(guest.options, incoming=True))
    for station in (guest.here, there):
        await put(station.host, capabilities, parameters)
    return there


async def tcp_uri(there: Booted) -> str:
    """Have it listen on a port that is free."""
    await receive(there.host, "tcp:127.0.0.1:0")
    address = (await there.host.qmp.execute("query-migrate"))["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


MULTIFD = {"multifd": True}, {"multifd-channels": 4}


@pytest.mark.parametrize(
    ("capabilities", "parameters"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param(*MULTIFD, id="multifd"),
        pytest.param({"xbzrle": True}, {}, id="xbzrle"),
        pytest.param({"switchover-ack": True, "return-path": True}, {}, id="switchover-ack"),
    ],
)
def test_over_tcp(
    tmp_path: Path, guest_program: Program, capabilities: dict[str, bool], parameters: dict[str, Any]
) -> None:
    async def story() -> None:
        async with under_load(tmp_path, guest_program) as guest:
            for _ in range(2):  # who arrived that way leaves that way
                there = await place(guest, capabilities, parameters)
                uri = await tcp_uri(there)
                went_well(await migrate(guest.host, uri, limit=LIMIT))
                await arrived(there.host, limit=LIMIT)
                await guest.settle_at(there)
                await goes_on(guest)

    asyncio.run(story())


def test_through_a_command(tmp_path: Path, guest_program: Program) -> None:
    async def story() -> None:
        async with under_load(tmp_path, guest_program) as guest:
            pipe = tmp_path / "pipe"
            os.mkfifo(pipe)
            there = await place(guest, {})
            await receive(there.host, f"exec:cat < {pipe}")
            went_well(await migrate(guest.host, f"exec:cat > {pipe}", limit=LIMIT))
            await arrived(there.host, limit=LIMIT)
            await guest.settle_at(there)
            await goes_on(guest)

            # The command has more to do than to pass it on.
            packed = tmp_path / "packed.gz"
            went_well(await migrate(guest.host, f"exec:gzip -1 > {packed}", limit=LIMIT))
            there = await place(guest, {})
            await receive(there.host, f"exec:gzip -dc < {packed}")
            await arrived(there.host, limit=LIMIT)
            await guest.settle_at(there)
            await goes_on(guest)

    asyncio.run(story())


HEADER = b"what stands before the offset belongs to somebody else".ljust(4096, b".")


@pytest.mark.parametrize(
    ("offset", "capabilities", "parameters"),
    [
        pytest.param(0, {}, {}, id="plain"),
        pytest.param(len(HEADER), {}, {}, id="offset"),
        pytest.param(0, {"mapped-ram": True}, {}, id="mapped-ram"),
        pytest.param(len(HEADER), {"mapped-ram": True}, {}, id="mapped-ram-offset"),
    ],
)
def test_into_a_file_and_out_of_it(
    tmp_path: Path,
    guest_program: Program,
    offset: int,
    capabilities: dict[str, bool],
    parameters: dict[str, Any],
) -> None:
    async def story() -> None:
        async with under_load(tmp_path, guest_program) as guest:
            file = tmp_path / "guest"
            file.write_bytes(HEADER[:offset])
            uri = f"file:{file}" + (f",offset={offset:#x}" if offset else "")
            await put(guest.host, capabilities, parameters)
            went_well(await migrate(guest.host, uri, limit=LIMIT))
            assert file.read_bytes()[:offset] == HEADER[:offset]

            # Nobody needs the guest's old place for this.
            there = await place(guest, {})
            await put(there.host, capabilities, parameters)
            await receive(there.host, uri)
            await arrived(there.host, limit=LIMIT)
            await guest.settle_at(there)
            await goes_on(guest)

    asyncio.run(story())


def test_a_guest_that_writes_too_fast_is_slowed_down_until_it_can_leave(
    tmp_path: Path, guest_program: Program
) -> None:
    async def story() -> None:
        # Not zeros: those cost nothing to send.
        writer = "dd if=/dev/urandom of=/from bs=1M count=24 2>/dev/null; while :; do cp /from /to; done &"
        async with under_load(tmp_path, guest_program, beside=writer) as guest:
            slow = {
                "max-bandwidth": 24 << 20,
                "downtime-limit": 1,
                "throttle-trigger-threshold": 10,
                "cpu-throttle-initial": 30,
                "max-cpu-throttle": 60,
            }
            there = await place(guest, {"auto-converge": True}, slow)
            uri = await tcp_uri(there)
            throttled: list[int] = []

            def watch(found: dict[str, Any]) -> None:
                if percentage := found.get("cpu-throttle-percentage", 0):
                    throttled.append(percentage)

            moving = asyncio.ensure_future(migrate(guest.host, uri, progress=watch, limit=2 * LIMIT))
            await guest.here.until(lambda: throttled or moving.done(), "throttling", LIMIT)
            assert throttled
            await put(guest.host, {}, {"max-bandwidth": 1 << 30, "downtime-limit": 1000})
            went_well(await moving)
            await arrived(there.host, limit=LIMIT)
            await guest.settle_at(there)
            await goes_on(guest)

    asyncio.run(story())


def test_a_place_with_another_uuid_is_refused(tmp_path: Path, guest_program: Program) -> None:
    async def story() -> None:
        uuid = ("-uuid", "11111111-2222-4333-8444-555555555555")
        async with under_load(tmp_path, guest_program, extra=uuid) as guest:
            other = replace(
                guest.options, incoming=True, extra=("-uuid", "66666666-7777-4888-8999-aaaaaaaaaaaa")
            )
            there = await guest.begin(other)
            for station in (guest.here, there):
                await put(station.host, {"validate-uuid": True})
            uri = await tcp_uri(there)
            with pytest.raises(MigrationFailed, match="goes on here"):
                await migrate(guest.host, uri, limit=LIMIT)
            with pytest.raises(MigrationFailed):
                await arrived(there.host, limit=LIMIT)
            await guest.leave(there)
            await goes_on(guest)

            there = await place(guest, {"validate-uuid": True})
            went_well(await migrate(guest.host, await tcp_uri(there), limit=LIMIT))
            await arrived(there.host, limit=LIMIT)
            await guest.settle_at(there)
            await goes_on(guest)

    asyncio.run(story())


def test_memory_that_stays_behind_is_refused(tmp_path: Path, guest_program: Program) -> None:
    async def story() -> None:
        async with under_load(tmp_path, guest_program, image=True) as guest:
            there = await place(guest, {"x-ignore-shared": True})
            uri = await tcp_uri(there)
            with pytest.raises(MigrationFailed, match="x-ignore-shared: guest memory"):
                await migrate(guest.host, uri, limit=LIMIT)
            with pytest.raises(SnapshotFailed, match="x-ignore-shared"):
                await snapshots.save(guest.host, "empty")
            assert await snapshots.listed(guest.host) == []
            await goes_on(guest)
            await guest.leave(there)

            await put(guest.host, {"x-ignore-shared": False})
            went_well(await guest.move())
            await goes_on(guest)

    asyncio.run(story())


@pytest.mark.parametrize("kernel", ["debian-6.1", "debian-backports"])
def test_other_kernels(tmp_path: Path, guest_program: Program, kernel: str) -> None:
    async def story() -> None:
        async with under_load(tmp_path, guest_program, kernel=kernel) as guest:
            for _ in range(3):
                went_well(await guest.move())
                await goes_on(guest)

    asyncio.run(story())
