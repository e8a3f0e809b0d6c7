"""A host as one state: what is saved of a guest that stays stopped, and what a check leaves behind."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock
from uuid import UUID

import pytest
from vmbus.bus import server
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.io.device import Device
from vmbus.bus.saved_state.restore import BusStateRefused
from vmbus.bus.saved_state.values import ChannelRecord
from vmbus.cli.devices import registry
from vmbus.errors import DeviceError, GatewayError
from vmbus.hypervisor import partition
from vmbus.machine.host import Host, HostOptions
from vmbus.machine.memory import RamRegion
from vmbus.machine.migration import host_state
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.qemu.discovery import QemuFacts
from vmbus.saving import StateRefused, read_machine
from vmbus_devices.scsi.controller import Controller

from tests.unit.machine.test_stored_states import FOLDER, NAMES, host_for

SIZE = 4 << 20


@contextmanager
def host(folder: Path, *lines: str) -> Iterator[Host]:
    """A host with these devices, whose guest has not run."""
    memory = folder / "memory"
    memory.write_bytes(b"")
    os.truncate(memory, SIZE)
    gateway = MagicMock()
    gateway.code_pages = None
    gateway.engine_event = MagicMock(side_effect=GatewayError("there is no gateway"))
    gateway.clock = SimpleNamespace(tsc_frequency=None, guest_tsc_now=lambda: None)
    gateway.unclaimed.return_value = []
    facts = QemuFacts(
        pid=os.getpid(),
        version="11.1.3",
        machine="q35",
        name=None,
        running=False,
        ram_path=memory,
        ram_size=SIZE,
        ram_regions=(RamRegion(0, SIZE, 0),),
        qtest_socket="",
        gateway_socket="",
        apic_ids=(0,),
        vcpus=1,
    )
    made = Host(facts, MagicMock(), MagicMock(), gateway, HostOptions())
    for device in registry().create_all(lines):
        made.add_device(device)
    try:
        yield made
    finally:
        made.workers.close()
        made.memory.close()


async def test_a_guest_that_stays_stopped_is_saved_as_it_is_each_time(tmp_path: Path) -> None:
    """Its host stays paused; what is plugged in meanwhile is there."""
    with host(tmp_path, "echo") as here:
        state = here.migration.state
        state.pause()
        state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20)
        [echo] = here.devices
        echo.device.save = lambda: b"another disk"  # type: ignore[method-assign]
        for device in registry().create_all(["shutdown"]):
            here.add_device(device)
        state.pause()
        saved = read_machine(state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20).data)
        assert saved.channels[0].state.device == b"another disk"
        assert len(saved.channels) == 2
        assert all(attached.channel.paused for attached in here.devices)


async def test_a_save_that_was_only_begun_leaves_nothing_behind(tmp_path: Path) -> None:
    with host(tmp_path, "echo", "shutdown") as here:
        state = here.migration.state
        for end in (state.resume, state.abandon_save, state.reset):
            state.pause()
            assert state.begin_save(), "the state is small"
            end()
            state.pause()
            assert len(state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20).channels) == 2
            state.resume()
            assert not any(attached.io.paused for attached in here.devices)


async def test_a_device_that_cannot_be_saved_is_heard_when_the_save_begins(tmp_path: Path) -> None:
    with host(tmp_path, "shutdown", "echo") as here:
        state = here.migration.state
        echo = here.devices[1].device
        saved = echo.save
        echo.save = MagicMock(side_effect=DeviceError("a disk in the middle of something"))  # type: ignore[method-assign]
        state.pause()
        with pytest.raises(StateRefused, match="a disk in the middle of something"):
            state.begin_save()
        echo.save = lambda: bytes(300 << 10)  # type: ignore[method-assign]
        assert not state.begin_save(), "nobody knows whether pages fit beside it"
        echo.save = saved  # type: ignore[method-assign]
        state.resume()
        assert not any(attached.io.paused for attached in here.devices)


async def test_a_state_that_is_only_checked_leaves_no_sub_channel_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with host(tmp_path, "echo") as here, host(tmp_path / "there", "echo") as there:
        [echo] = here.devices
        echo.io._channel = echo.channel
        echo.io.offer_subchannels(2)
        here.migration.state.pause()
        data = here.migration.state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20).data
        assert len(read_machine(data).channels) == 3
        there.migration.expect()
        for _ in range(2):
            there.migration.state.check(data)
            assert there.devices[0].io.subchannels == []
            assert len([channel for channel in there.bus.channels if channel.offer.subchannel_index]) == 0


@pytest.mark.parametrize("name", NAMES)
async def test_a_guest_that_arrived_and_stays_stopped_is_saved_as_it_came(tmp_path: Path, name: str) -> None:
    """It can leave a second time, and whatever was outstanding is still so."""
    data, channels = (FOLDER / f"{name}.bin").read_bytes(), []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        here = host_for(tmp_path / str(number), name)
        here.gateway.unclaimed.return_value = []  # type: ignore[attr-defined]
        here.migration.load(data)
        here.migration.stay_stopped()
        assert here.migration.phase is Phase.IDLE
        here.migration.state.pause()
        data = here.migration.state.save(1 << 20, memory_stays=False, pages=(), limit=1 << 20).data
        channels.append([each.state for each in read_machine(data).channels])
        here.workers.close()
        here.memory.close()
    assert channels[0] == channels[1] == channels[2]


@pytest.mark.parametrize("name", NAMES)
async def test_a_guest_stands_still_for_one_check_of_its_state(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is applied as it is: page lists are walked once for the check and once for the restore."""
    checked: list[str] = []

    def count(module: ModuleType, what: str) -> None:
        check = module.check_state

        def counted(*arguments: object) -> None:
            checked.append(what)
            check(*arguments)

        monkeypatch.setattr(module, "check_state", counted)

    count(host_state, "bus")
    count(server, "bus again")
    count(partition, "hypervisor")
    here = host_for(tmp_path, name)
    for each in here.devices:

        def accept(
            state: bytes,
            device: Device = each.device,
            check: Callable[[bytes], None] = each.device.check_restore,
        ) -> None:
            checked.append(device.name)
            check(state)

        monkeypatch.setattr(each.device, "check_restore", accept)
    here.migration.load((FOLDER / f"{name}.bin").read_bytes())
    assert sorted(checked) == sorted(["bus", "hypervisor", *(each.device.name for each in here.devices)])
    open_without_ring = ChannelRecord(UUID(int=1), UUID(int=2), 0, ChannelState.OPEN)
    here.bus.reset()
    with pytest.raises(BusStateRefused, match="inconsistent"):  # for others, a restore checks by itself
        here.bus.restore(dataclasses.replace(here.bus.save(), channels=(open_without_ring,)))
    here.workers.close()
    here.memory.close()


async def test_a_state_is_compared_with_what_is_here_while_the_guest_runs(tmp_path: Path) -> None:
    with host(tmp_path, "scsi,format=memory,size=8M", "echo") as here:
        state = here.migration.state
        state.pause()
        data = state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20).data
        state.resume()
        state.check_fits(data)
        controller = here.devices[0].device
        assert isinstance(controller, Controller)
        unit = controller.units.pop((0, 0))
        with pytest.raises(StateRefused, match="is missing here"):
            state.check_fits(data)
        controller.units[0, 0] = unit
        state.check_fits(data)
        here.remove_device(here.devices[1])
        with pytest.raises(StateRefused, match="does not offer"):
            state.check_fits(data)


async def test_a_missing_device_costs_its_channel_if_the_user_allows_it(tmp_path: Path) -> None:
    """And nothing else: all other channels are open as they were. It is said in ``status`` until the next guest."""
    data = (FOLDER / "0.1.0.bin").read_bytes()
    here = host_for(tmp_path, "0.1.0")
    [echo] = [each for each in here.devices if each.device.name == "echo"]
    here.remove_device(echo)
    with pytest.raises(StateRefused, match=r"does not offer.*--allow-missing-devices"):
        here.migration.load(data)
    assert here.problems.sentences == []
    here.migration.allow_missing_devices = True
    here.migration.state.check(data, allow_missing=True)
    here.migration.load(data)
    [sentence] = here.problems.sentences
    assert "their channels are revoked" in sentence
    assert str(echo.channel.offer.instance_id) in sentence
    here.migration.state.resume()
    states = {channel.offer.key: channel.state for channel in here.bus.channels}
    assert states.pop(echo.channel.offer.key) is ChannelState.REVOKED
    assert set(states.values()) == {ChannelState.OPEN}
    assert len(states) == len(here.devices)
    here.reset()
    assert here.problems.sentences == []
    here.workers.close()
    here.memory.close()


async def test_a_device_that_was_taken_away_is_not_missed_before_its_guest_has_released_it(
    tmp_path: Path,
) -> None:
    hosts = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        hosts.append(host_for(tmp_path / name, "0.1.0"))
    here, there = hosts
    here.migration.load((FOLDER / "0.1.0.bin").read_bytes())
    here.migration.state.resume()
    for each in hosts:
        [echo] = [attached for attached in each.devices if attached.device.name == "echo"]
        each.remove_device(echo)
    here.migration.state.pause()
    data = here.migration.state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20).data
    there.migration.load(data)
    assert there.problems.sentences == []
    there.migration.state.resume()
    states = {channel.offer.key: channel.state for channel in there.bus.channels}
    assert states.pop(echo.channel.offer.key) is ChannelState.REVOKED
    assert set(states.values()) == {ChannelState.OPEN}
    for each in hosts:
        each.partition.pause()
        each.workers.close()
        each.memory.close()


async def test_a_snapshot_fits_without_a_device_if_the_user_allows_it(tmp_path: Path) -> None:
    with host(tmp_path, "shutdown", "echo") as here:
        state = here.migration.state
        state.pause()
        data = state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20).data
        state.resume()
        here.remove_device(here.devices[1])
        with pytest.raises(StateRefused, match="--allow-missing-devices"):
            state.check_fits(data)
        state.check_fits(data, allow_missing=True)
        here.migration.expect_instead(allow_missing_devices=True)
        here.migration.load(data)
        assert here.migration.phase is Phase.LOADED
        assert len(here.problems.sentences) == 1
