"""The second carrier: a state that goes from emulator to emulator, beside QEMU's stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vmbus.errors import UserError
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.drive import MigrationFailed, arrived, migrate, receive
from vmbus.machine.migration.side_channel import CarrierAddress
from vmbus.machine.migration.state_machine import Phase, Switchover

from tests.guest.harness import Booted
from tests.migration.journey import Journey, journey
from tests.migration.test_live import Unsavable, more_beats

pytestmark = pytest.mark.guest

LIMIT = 180
UUID = "11111111-2222-4333-8444-555555555555"


async def listening(guest: Journey, carrier: CarrierAddress, *, uuid: str = UUID) -> Booted:
    extra = ("-uuid", uuid)
    there = await guest.begin(replace(guest.options, incoming=True, extra=extra))
    await receive(there.host.migration, guest.uri(there), carrier=carrier)
    return there


async def moved(guest: Journey, carrier: CarrierAddress) -> None:
    there = await listening(guest, carrier)
    await migrate(guest.host.migration, guest.uri(there), carrier=carrier, timeout=LIMIT)
    await arrived(there.host.migration, timeout=LIMIT)
    await guest.settle_at(there)
    await more_beats(guest)


def dying(there: Booted, gone: bool) -> Callable[[bytes], None]:
    def check(state: bytes) -> None:
        there.guest.process.process.kill()
        if gone:
            raise ConnectionResetError

    return check


async def test_a_qemu_without_dbus(tmp_path: Path) -> None:
    async with journey(tmp_path, dbus=False, extra=("-uuid", UUID)) as guest:
        await more_beats(guest)
        assert guest.host.facts.dbus_address is None
        socket = CarrierAddress("unix", tmp_path / "c.sock")
        for _ in range(2):  # a guest that arrived with a side channel leaves with one
            await moved(guest, socket)
        await moved(guest, CarrierAddress("file", tmp_path / "state"))

        # No side channel, no listener, another machine: the migration does not begin.
        with pytest.raises(MigrationFailed, match="with --carrier"):
            await migrate(guest.host.migration, f"unix:{tmp_path}/nobody", timeout=LIMIT)
        with pytest.raises(UserError, match="no emulator receives a state"):
            await migrate(guest.host.migration, f"unix:{tmp_path}/nobody", carrier=socket, timeout=LIMIT)
        there = await listening(guest, socket, uuid=UUID.replace("1", "6"))
        with pytest.raises(UserError, match="waits for machine 66666666"):
            await migrate(guest.host.migration, guest.uri(there), carrier=socket, timeout=LIMIT)
        await guest.leave(there)
        await more_beats(guest)

        # Another program drives, and nothing carries the state: the guest stays.
        there = await listening(guest, socket)
        coordinator = guest.host.migration
        await guest.host.qmp.execute("migrate", {"uri": guest.uri(there)})
        await guest.here.migration(
            lambda: coordinator.report.statuses[-1:] in (["cancelled"], ["failed"]), "end of the migration"
        )
        assert "nothing carries" in coordinator.report.refusal
        await guest.leave(there)
        await more_beats(guest)

        # The target has other devices: it says so before QEMU may go on.
        there = await guest.begin(replace(guest.options, incoming=True), devices=("shutdown",))
        await receive(there.host.migration, guest.uri(there), carrier=socket)
        with pytest.raises(MigrationFailed, match=r"not-there.*continues here"):
            await migrate(guest.host.migration, guest.uri(there), carrier=socket, timeout=LIMIT)
        await guest.leave(there)
        await more_beats(guest)

        # The target's QEMU dies, and then its emulator's end of the socket, before there is an answer.
        for gone in (False, True):
            there = await listening(guest, socket)
            incoming = there.host.migration.side_channel._incoming
            assert incoming is not None
            incoming._check = dying(there, gone)
            with pytest.raises(MigrationFailed, match="continues here"):
                await migrate(guest.host.migration, guest.uri(there), carrier=socket, timeout=LIMIT)
            await guest.leave(there)
            await more_beats(guest)

        await moved(guest, socket)
        assert guest.device("heartbeat").status()["odd_answers"] == 0


OLD = "from another migration"


@pytest.mark.parametrize("harms", [("truncated", "damaged", "missing"), (OLD,)], ids="-".join)
async def test_a_file_that_is_not_the_guests_is_refused_and_the_guest_taken_back(
    tmp_path: Path, harms: tuple[str, ...]
) -> None:
    path = tmp_path / "state"
    carrier = CarrierAddress("file", path)

    dbus = OLD in harms  # QEMU's stream says which frame is meant
    async with journey(tmp_path, dbus=dbus, extra=("-uuid", UUID)) as guest:
        await more_beats(guest)
        if dbus:
            await moved(guest, carrier)
        old = path.read_bytes() if path.exists() else b""
        for harm in harms:
            there = await listening(guest, carrier)
            coordinator = guest.host.migration
            before = coordinator.report
            with guest_waits(coordinator):
                moving = asyncio.ensure_future(
                    migrate(guest.host.migration, guest.uri(there), carrier=carrier, timeout=LIMIT)
                )
                await guest.here.migration(
                    lambda: coordinator.report is not before and coordinator.ready,
                    "state made ready",
                )
                data = path.read_bytes()
                if harm == "truncated":
                    path.write_bytes(data[:-1])
                elif harm == "damaged":
                    path.write_bytes(data[:100] + bytes((data[100] ^ 1,)) + data[101:])
                elif harm == "missing":
                    path.unlink()
                else:
                    path.write_bytes(old)
                await guest.host.qmp.execute("migrate-continue", {"state": "pre-switchover"})
                if dbus:
                    with pytest.raises(MigrationFailed, match="continues here"):
                        await moving
                else:
                    await moving
            with pytest.raises(MigrationFailed):
                await arrived(there.host.migration, timeout=LIMIT)
            assert (await there.host.qmp.execute("query-status"))["status"] != "running"
            await guest.leave(there)
            if not dbus:
                assert coordinator.phase is Phase.LEFT
                await coordinator.take_back()
            await more_beats(guest)


@contextlib.contextmanager
def guest_waits(coordinator: Coordinator) -> Iterator[None]:
    coordinator.switchover = Switchover.OBSERVE
    yield
    coordinator.switchover = Switchover.OWN


async def test_more_state_than_qemu_carries(tmp_path: Path) -> None:
    async with journey(tmp_path, extra=("-uuid", UUID)) as guest:
        await more_beats(guest)
        device = guest.device("heartbeat")
        device.__class__ = Large
        carrier = CarrierAddress("unix", tmp_path / "c.sock")
        there = await listening(guest, carrier)
        there.device("heartbeat").__class__ = Large
        outcome = await migrate(guest.host.migration, guest.uri(there), carrier=carrier, timeout=LIMIT)
        assert outcome.report.state_bytes > 2 << 20
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await more_beats(guest)


class Large(Unsavable):
    """A heartbeat with two MiB to save."""

    def save(self) -> bytes:
        return super().save() + bytes(2 << 20)

    def restore(self, state: bytes) -> None:
        super().restore(state[: -(2 << 20)])
