"""The ways out of a QEMU, and what may be set for them: through each of them a guest under load goes unharmed."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vmbus.machine.migration.drive import MigrationFailed, arrived, migrate, receive

from tests.guest.matrix import full
from tests.migration.load import LIMIT, Program, guest_resumed, place, put, tcp_uri, under_load, went_well

pytestmark = pytest.mark.guest

MULTIFD = {"multifd": True}, {"multifd-channels": 4}


WAYS: list[tuple[dict[str, bool], dict[str, Any]]] = [
    ({}, {}),
    MULTIFD,
    ({"xbzrle": True}, {}),
    ({"switchover-ack": True, "return-path": True}, {}),
]


@pytest.mark.parametrize("times", [1, full(2)])
async def test_over_tcp(tmp_path: Path, guest_program: Program, times: int) -> None:
    async with under_load(tmp_path, guest_program) as guest:
        # A guest that arrived one way leaves the next one, and (with two times) that way too.
        for capabilities, parameters in [way for way in WAYS for _ in range(times)]:
            await put(guest.host, dict.fromkeys(("multifd", "xbzrle", "switchover-ack"), False))
            there = await place(guest, capabilities, parameters)
            uri = await tcp_uri(there)
            went_well(await migrate(guest.host.migration, uri, timeout=LIMIT))
            await arrived(there.host.migration, timeout=LIMIT)
            await guest.settle_at(there)
            await guest_resumed(guest)


@pytest.mark.full
async def test_through_a_command(tmp_path: Path, guest_program: Program) -> None:
    async with under_load(tmp_path, guest_program) as guest:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        there = await place(guest, {})
        await receive(there.host.migration, f"exec:cat < {pipe}")
        went_well(await migrate(guest.host.migration, f"exec:cat > {pipe}", timeout=LIMIT))
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await guest_resumed(guest)

        # The command has more to do than to pass it on.
        packed = tmp_path / "packed.gz"
        went_well(await migrate(guest.host.migration, f"exec:gzip -1 > {packed}", timeout=LIMIT))
        there = await place(guest, {})
        await receive(there.host.migration, f"exec:gzip -dc < {packed}")
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await guest_resumed(guest)


HEADER = b"what stands before the offset belongs to another program".ljust(4096, b".")


async def test_into_a_file_and_out_of_it(tmp_path: Path, guest_program: Program) -> None:
    async with under_load(tmp_path, guest_program) as guest:
        for offset, mapped in ((0, False), (len(HEADER), False), (0, True), (len(HEADER), True)):
            capabilities = {"mapped-ram": mapped}
            file = tmp_path / f"guest-{offset}-{mapped}"
            file.write_bytes(HEADER[:offset])
            uri = f"file:{file}" + (f",offset={offset:#x}" if offset else "")
            await put(guest.host, capabilities)
            went_well(await migrate(guest.host.migration, uri, timeout=LIMIT))
            assert file.read_bytes()[:offset] == HEADER[:offset]

            # The guest's old place is not needed for this.
            there = await place(guest, {})
            await put(there.host, capabilities)
            await receive(there.host.migration, uri)
            await arrived(there.host.migration, timeout=LIMIT)
            await guest.settle_at(there)
            await guest_resumed(guest)


async def test_a_guest_that_writes_too_fast_is_slowed_down_until_it_can_leave(
    tmp_path: Path, guest_program: Program
) -> None:
    # Not zeros: those cost nothing to send.
    writer = "dd if=/dev/urandom of=/from bs=1M count=24 2>/dev/null; while :; do cp /from /to; done &"
    async with under_load(tmp_path, guest_program, side_channel=writer) as guest:
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

        moving = asyncio.ensure_future(migrate(guest.host.migration, uri, progress=watch, timeout=2 * LIMIT))
        await guest.here.until(lambda: throttled or moving.done(), "throttling", there)
        assert throttled
        await put(guest.host, {}, {"max-bandwidth": 1 << 30, "downtime-limit": 1000})
        went_well(await moving)
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await guest_resumed(guest)


async def test_a_place_with_another_uuid_is_refused(tmp_path: Path, guest_program: Program) -> None:
    uuid = ("-uuid", "11111111-2222-4333-8444-555555555555")
    async with under_load(tmp_path, guest_program, extra=uuid) as guest:
        other = replace(guest.options, incoming=True, extra=("-uuid", "66666666-7777-4888-8999-aaaaaaaaaaaa"))
        there = await guest.begin(other)
        for station in (guest.here, there):
            await put(station.host, {"validate-uuid": True})
        uri = await tcp_uri(there)
        with pytest.raises(MigrationFailed, match="continues here"):
            await migrate(guest.host.migration, uri, timeout=LIMIT)
        with pytest.raises(MigrationFailed):
            await arrived(there.host.migration, timeout=LIMIT)
        await guest.leave(there)
        await guest_resumed(guest)

        there = await place(guest, {"validate-uuid": True})
        went_well(await migrate(guest.host.migration, await tcp_uri(there), timeout=LIMIT))
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await guest_resumed(guest)
