"""Migrations at awkward moments: while a guest boots, while it opens, closes, loads modules, shares much memory, and
with rings that are full.

A moment that a guest is in only for milliseconds is caught by stopping it there. A guest that was stopped before its
migration arrives stopped, and goes on from that very moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.wire.packet import Packet
from vmbus.wire.ring import RESERVED_BYTES
from vmbus_devices.echo import Echo

from tests.guest.harness import LOADED_MODULES
from tests.guest.matrix import full
from tests.guest.test_boot import complaints
from tests.guest.waiting import while_alive
from tests.migration.journey import Journey, journey
from tests.migration.load import ECHOING, Program, guest_resumed, went_well
from tests.migration.test_live import more_beats

pytestmark = pytest.mark.guest

ECHO = ("heartbeat,interval=0.05", "shutdown", "echo")
UIO = (*LOADED_MODULES, "uio_hv_generic")
MESSAGES = 1024
"""Bytes that the messages still have that a guest may have posted when it is stopped."""


@contextlib.asynccontextmanager
async def echoing(folder: Path, program: Program, command: str, *, smp: int = 1) -> AsyncIterator[Journey]:
    """A guest with an echo client, which ``command`` runs."""
    client = [(program("echo_client"), "/bin/echo_client")]
    async with journey(folder, smp=smp, devices=ECHO, load=UIO, add=client, command=[command]) as guest:
        guest.here.failure_word = b"failed"
        yield guest


def unharmed(guest: Journey) -> None:
    text = guest.here.output.decode()
    assert "failed" not in text, text
    found = guest.here.status()
    assert all(channel["refusals"] == {} for channel in found["channels"])
    assert found["bus"]["refusals"] == {}
    assert complaints(guest.here.console()) == []


async def caught(guest: Journey, condition: Callable[[], object]) -> None:
    """Stop the guest while ``condition()`` holds."""
    async with while_alive("moment in which the guest is to be stopped", guest.here):
        while True:
            await asyncio.sleep(0)  # these moments are short: look after every turn of the host
            if condition():
                await guest.host.qmp.execute("stop")
                if condition():
                    return
                await guest.host.qmp.execute("cont")


def knows_its_hypervisor(guest: Journey) -> bool:
    """It has named itself, and has not connected to the bus yet."""
    return bool(guest.host.partition.guest_os_id) and guest.host.bus.status()["version"] is None


def opens_channels(guest: Journey) -> bool:
    """It has connected to the bus, and has not opened every channel yet."""
    states = [channel["state"] for channel in guest.here.status()["channels"]]
    return guest.host.bus.status()["version"] is not None and states.count("open") < len(ECHO)


def shares_partly(guest: Journey) -> bool:
    assemblies = guest.host.bus.gpadl_assembler.assemblies.values()
    return any(0 < len(each.data) < each.capacity - MESSAGES for each in assemblies)


@pytest.mark.parametrize("smp", [full(1), 2])
async def test_while_the_guest_boots(tmp_path: Path, guest_program: Program, smp: int) -> None:
    async with echoing(tmp_path, guest_program, ECHOING, smp=smp) as guest:
        for moment in (knows_its_hypervisor, opens_channels):
            await caught(guest, lambda: moment(guest))
            await guest.move()
            assert moment(guest)
            await guest.host.qmp.execute("cont")
        while b"started" not in guest.here.output:
            await guest.here.until(
                lambda: guest.host.service.traps or b"started" in guest.here.output,
                "the boot to go on",
            )
            await guest.move()
        await guest.here.says("started")
        await guest_resumed(guest)


@pytest.mark.parametrize("moves", [2, full(4)])
async def test_while_channels_are_opened_and_closed(
    tmp_path: Path, guest_program: Program, moves: int
) -> None:
    async with echoing(
        tmp_path,
        guest_program,
        "while echo_client --count 50 --cycles 20; do :; done; echo failed",
        smp=2,
    ) as guest:
        await guest.here.says("}")
        for _ in range(moves):
            opens = guest.here.channel("echo")["opens"]
            went_well(await guest.move())
            await guest.here.until(lambda: guest.here.channel("echo")["opens"] > opens + 2, "opened channels")
        unharmed(guest)


@pytest.mark.full
@pytest.mark.parametrize("moves", [2, 4])
async def test_while_modules_come_and_go(tmp_path: Path, moves: int) -> None:
    async with journey(
        tmp_path,
        smp=2,
        command=[
            "i=0; while rmmod hv_utils && rmmod hv_vmbus && modprobe hv_vmbus && modprobe hv_utils; "
            "do i=$((i+1)); echo round $i; done; echo failed"
        ],
    ) as guest:
        await guest.here.says("round 1")
        for _ in range(moves):
            await guest.move()
            rounds = guest.here.output.count(b"round")
            await guest.here.until(lambda: guest.here.output.count(b"round") > rounds, "another round")
        unharmed(guest)


@pytest.mark.parametrize("moves", [2, full(4)])
async def test_in_the_middle_of_a_gpadl_of_many_messages(
    tmp_path: Path, guest_program: Program, moves: int
) -> None:
    """uio_hv_generic shares 31 MiB in one list, when it takes a device."""
    async with echoing(
        tmp_path,
        guest_program,
        "echo started; while echo_client --count 100 && rmmod uio_hv_generic && modprobe uio_hv_generic; "
        "do :; done; echo failed",
    ) as guest:
        await guest.here.says("started")
        for _ in range(moves):
            await caught(guest, lambda: shares_partly(guest))
            await guest.move()
            assert shares_partly(guest)
            await guest.host.qmp.execute("cont")
            reports = guest.here.output.count(b"}\n")
            await guest.here.until(lambda: guest.here.output.count(b"}\n") > reports + 1, "echoes after that")
        unharmed(guest)


@pytest.mark.parametrize("moves", [2, full(4)])
async def test_with_a_ring_that_is_full(tmp_path: Path, guest_program: Program, moves: int) -> None:
    """The host sends faster than the guest reads: packets wait for room, and go along."""
    async with echoing(
        tmp_path,
        guest_program,
        "echo started; while echo_client --count 2000 --burst 4096 --generate 20000 --size 4000; do :; done; "
        "echo failed",
    ) as guest:
        await guest.here.says("started")
        for _ in range(moves):
            io = echo_io(guest)
            await caught(guest, lambda: io.backlog)
            await guest.move()
            await guest.host.qmp.execute("cont")
            await more_beats(guest)
        await guest_resumed(guest)


class Slow(Echo):
    """Takes requests, and answers none of them until :meth:`catch_up`."""

    kept: list[Packet]

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        self.kept.append(packet)

    def catch_up(self, io: ChannelIo) -> None:
        self.__class__ = Echo  # type: ignore[assignment]
        for packet in self.kept:
            self.packet(io, packet)


def echo_io(guest: Journey) -> ChannelIo:
    return next(each.io for each in guest.host.devices if each.device.name == "echo")


def waits_for_room(io: ChannelIo) -> bool:
    """The guest has filled its ring, and wants a signal when there is room again."""
    ring = io._turns.incoming
    if ring is None:
        return False
    wanted = ring.control().pending_send_size
    return wanted > 0 and ring.size - RESERVED_BYTES - ring.available < wanted


def waits_for_each_other(io: ChannelIo) -> bool:
    """Both rings are full."""
    ring = io._outgoing
    return ring is not None and waits_for_room(io) and io.backlog > 0 and ring.free < PACKET


PACKET = 4000
"""Bytes of data in a request, and in its answer."""
BURST = 1200
"""Requests that the guest sends before it wants an answer: more than both rings hold."""


@pytest.mark.parametrize("times", [1, full(2)])
async def test_with_a_ring_that_the_guest_has_filled(
    tmp_path: Path, guest_program: Program, times: int
) -> None:
    """The guest sends faster than the host takes: it waits for room, and is signalled when there is some."""
    async with echoing(
        tmp_path,
        guest_program,
        f"echo started; while echo_client --count {50 * BURST} --burst {BURST} --size {PACKET} "
        "--answers completion; do :; done; echo failed",
    ) as guest:
        await guest.here.says("started")
        for _ in range(times):
            # Both rings are full: the guest waits for the host, and the host for the guest.
            io = echo_io(guest)
            await caught(guest, lambda: waits_for_each_other(io))
            went_well(await guest.move())
            await guest.host.qmp.execute("cont")
            requests = guest.device("echo").status()["requests"]
            await guest.here.until(
                lambda: guest.device("echo").status()["requests"] > requests + 2 * BURST,
                "echoes after that",
            )

            # The host takes nothing, there or here: only room that comes later can wake the guest.
            echo_io(guest).pause_input()
            await guest.here.until(lambda: waits_for_room(echo_io(guest)), "a ring that is full")
            went_well(await guest.move())
            io, device = echo_io(guest), guest.device("echo")
            await more_beats(guest)  # signals of its arrival have been handled by now
            assert waits_for_room(io)
            assert io.counters.packets_in == io.counters.packets_out == 0
            device.__class__ = Slow
            assert isinstance(device, Slow)
            device.kept = []
            io.resume_input()
            # The host takes what may be in a saved state; the guest fills the room, and waits again.
            await guest.here.until(lambda: io.budget.full and waits_for_room(io), "a ring that is full again")
            assert io.counters.packets_in == len(device.kept) > 0
            assert io.counters.packets_out == 0
            device.catch_up(io)
            await guest.here.until(
                lambda: io.counters.packets_out > 3 * BURST, "echoes after those that were late"
            )
        await guest_resumed(guest)
