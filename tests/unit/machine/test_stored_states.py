"""States of real guests, stored when their format was released: a host of today takes each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from vmbus.bus.channel.state import ChannelState
from vmbus.cli.devices import registry
from vmbus.errors import GatewayError
from vmbus.machine.host import Host, HostOptions
from vmbus.machine.memory import RamRegion
from vmbus.machine.qemu.discovery import QemuFacts
from vmbus.saving import StateRefused

FOLDER = Path(__file__).parent / "stored_states"
NAMES = sorted(path.stem for path in FOLDER.glob("*.bin"))


def host_for(folder: Path, name: str, nobody: Callable[[], Any] = MagicMock) -> Host:
    """A host as it waits for that guest, with an empty memory and ``nobody`` behind its sockets."""
    described = json.loads((FOLDER / f"{name}.json").read_text())
    regions = tuple(RamRegion(**region) for region in described["regions"])
    memory = folder / "memory"
    memory.touch()
    os.truncate(memory, max(region.offset + region.size for region in regions))
    gateway = nobody()
    gateway.code_pages = None
    gateway.engine_event = MagicMock(side_effect=GatewayError("there is no gateway"))
    gateway.clock = SimpleNamespace(tsc_frequency=None, guest_tsc_now=lambda: None)
    facts = QemuFacts(
        pid=os.getpid(),
        version="11.1.3",
        machine="q35",
        name=None,
        running=False,
        ram_path=memory,
        ram_size=sum(region.size for region in regions),
        ram_regions=regions,
        qtest_socket="",
        gateway_socket="",
        apic_ids=tuple(range(described["vcpus"])),
        vcpus=described["vcpus"],
    )
    host = Host(facts, nobody(), nobody(), gateway, HostOptions())
    for device in registry().create_all(described["devices"]):
        host.add_device(device)
    host.migration.expect()
    return host


@pytest.mark.parametrize("name", NAMES)
async def test_a_stored_state_is_taken(tmp_path: Path, name: str) -> None:
    host = host_for(tmp_path, name)
    host.migration.load((FOLDER / f"{name}.bin").read_bytes())
    for channel in host.bus.channels:
        assert channel.state is ChannelState.OPEN, channel.offer
    devices = {each.device.name: each.device.status() for each in host.devices}
    assert devices["heartbeat"]["answers"] > 0
    assert devices["echo"]["requests"] > 5000
    assert host.partition.synic.vps[0].simp.value & 1
    host.workers.close()
    host.memory.close()


@pytest.mark.parametrize("name", NAMES)
async def test_a_stored_state_with_a_byte_changed_is_not(tmp_path: Path, name: str) -> None:
    data = bytearray((FOLDER / f"{name}.bin").read_bytes())
    data[len(data) // 2] ^= 1
    host = host_for(tmp_path, name)
    with pytest.raises(StateRefused, match="damaged"):
        host.migration.load(bytes(data))
    host.workers.close()
    host.memory.close()


def test_there_is_a_stored_state() -> None:
    assert "first" in NAMES
