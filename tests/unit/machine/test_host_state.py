"""A host as one state: what is saved of a guest that stays stopped, and what a check leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

from vmbus.cli.devices import registry
from vmbus.machine.host import Host, HostOptions
from vmbus.machine.memory import RamRegion
from vmbus.machine.qemu.discovery import QemuFacts
from vmbus.saving import read_machine

SIZE = 4 << 20


@contextmanager
def host(folder: Path, *lines: str) -> Iterator[Host]:
    """A host with these devices, whose guest has not run."""
    memory = folder / "memory"
    memory.write_bytes(b"")
    os.truncate(memory, SIZE)
    gateway = MagicMock()
    gateway.code_pages = None
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
