"""Migrations at awkward moments: while a guest boots, while it opens, closes, loads modules, shares much memory, and
with a ring that is full.

A moment that a guest is in only for milliseconds is caught by stopping it there. A guest that was stopped before its
migration arrives stopped, and goes on from that very moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.harness import LIMIT, LOADED_MODULES
from tests.guest.test_boot import complaints
from tests.migration.journey import Journey, journey
from tests.migration.load import ECHOING, Program, goes_on, went_well
from tests.migration.test_live import more_beats

pytestmark = pytest.mark.guest

ECHO = ("heartbeat,interval=0.05", "shutdown", "echo")
UIO = (*LOADED_MODULES, "uio_hv_generic")
MESSAGES = 1024
"""Bytes that the messages still have that a guest may have posted when it is stopped."""


def unharmed(guest: Journey) -> None:
    text = guest.here.output.decode()
    assert "failed" not in text, text
    found = guest.here.status()
    assert all(channel["refusals"] == {} for channel in found["channels"])
    assert found["bus"]["refusals"] == {}
    assert complaints(guest.here.console()) == []


async def caught(guest: Journey, condition: Callable[[], object]) -> None:
    """Stop the guest while ``condition()`` holds."""
    async with asyncio.timeout(LIMIT):
        while True:
            await asyncio.sleep(0)  # these moments are short: look after every turn of the host
            if condition():
                await guest.host.qmp.execute("stop")
                if condition():
                    return
                await guest.host.qmp.execute("cont")


def shares_partly(guest: Journey) -> bool:
    assemblies = guest.host.bus.gpadls.assemblies.values()
    return any(0 < len(each.data) < each.capacity - MESSAGES for each in assemblies)


@pytest.mark.parametrize("smp", [1, 2])
def test_while_the_guest_boots(tmp_path: Path, guest_program: Program, smp: int) -> None:
    async def story() -> None:
        async with journey(
            tmp_path,
            smp=smp,
            devices=ECHO,
            load=UIO,
            add=[(guest_program("echo_client"), "/bin/echo_client")],
            command=[ECHOING],
        ) as guest:
            seen = set()
            while b"started" not in guest.here.output:
                await guest.here.until(
                    lambda: guest.host.gateway_traps or b"started" in guest.here.output,
                    "the boot to go on",
                )
                await guest.move()
                status = guest.here.status()
                seen.add(
                    (status["bus"]["state"], len([c for c in status["channels"] if c["state"] == "open"]))
                )
            assert len(seen) > 1, seen  # more than one state of the bus was moved
            await guest.here.says("started")
            await goes_on(guest)

    asyncio.run(story())


def test_while_channels_are_opened_and_closed(tmp_path: Path, guest_program: Program) -> None:
    async def story() -> None:
        async with journey(
            tmp_path,
            smp=2,
            devices=ECHO,
            load=UIO,
            add=[(guest_program("echo_client"), "/bin/echo_client")],
            command=["while echo_client --count 50 --cycles 20; do :; done; echo failed"],
        ) as guest:
            await guest.here.says("}")
            for _ in range(4):
                opens = guest.here.channel("echo")["opens"]
                went_well(await guest.move())
                await guest.here.until(
                    lambda before=opens: guest.here.channel("echo")["opens"] > before + 2, "opened channels"
                )
            unharmed(guest)

    asyncio.run(story())


def test_while_modules_come_and_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with journey(
            tmp_path,
            smp=2,
            command=[
                "i=0; while rmmod hv_utils && rmmod hv_vmbus && modprobe hv_vmbus && modprobe hv_utils; "
                "do i=$((i+1)); echo round $i; done; echo failed"
            ],
        ) as guest:
            await guest.here.says("round 1")
            for _ in range(4):
                await guest.move()
                rounds = guest.here.output.count(b"round")
                await guest.here.until(
                    lambda before=rounds: guest.here.output.count(b"round") > before, "another round"
                )
            unharmed(guest)

    asyncio.run(story())


def test_in_the_middle_of_a_gpadl_of_many_messages(tmp_path: Path, guest_program: Program) -> None:
    """uio_hv_generic shares 31 MiB in one list, when it takes a device."""

    async def story() -> None:
        async with journey(
            tmp_path,
            devices=ECHO,
            load=UIO,
            add=[(guest_program("echo_client"), "/bin/echo_client")],
            command=[
                "echo started; while echo_client --count 100 && rmmod uio_hv_generic && modprobe uio_hv_generic; "
                "do :; done; echo failed"
            ],
        ) as guest:
            await guest.here.says("started")
            for _ in range(4):
                await caught(guest, lambda: shares_partly(guest))
                await guest.move()
                assert shares_partly(guest)
                await guest.host.qmp.execute("cont")
                reports = guest.here.output.count(b"}\n")
                await guest.here.until(
                    lambda before=reports: guest.here.output.count(b"}\n") > before + 1, "echoes after that"
                )
            unharmed(guest)

    asyncio.run(story())


def test_with_a_ring_that_is_full(tmp_path: Path, guest_program: Program) -> None:
    """The host sends faster than the guest reads: packets wait for room, and go along."""

    async def story() -> None:
        async with journey(
            tmp_path,
            devices=ECHO,
            load=UIO,
            add=[(guest_program("echo_client"), "/bin/echo_client")],
            command=[
                "echo started; while echo_client --count 2000 --burst 4096 --generate 20000 --size 4000; do :; done; "
                "echo failed"
            ],
        ) as guest:
            await guest.here.says("started")
            for _ in range(4):
                io = next(each.io for each in guest.host.devices if each.device.name == "echo")
                await caught(guest, lambda io=io: io.backlog)
                await guest.move()
                await guest.host.qmp.execute("cont")
                await more_beats(guest)
            await goes_on(guest)

    asyncio.run(story())
