"""What one emulator says of its QEMU and its options is what the other one has."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from vmbus.hypervisor.features import Features
from vmbus.machine.host import HostOptions
from vmbus.machine.memory import RamRegion
from vmbus.machine.migration.state_machine import Switchover
from vmbus.machine.qemu.discovery import QemuFacts
from vmbus.machine.qemu.memory_devices import MemoryDevice
from vmbus.machine.reload.description import facts_values, options_values, read_facts, read_options
from vmbus.machine.reload.link import ReloadFailed
from vmbus.wire.cpuid import HostVersion
from vmbus.wire.version import Version

FACTS = QemuFacts(
    pid=17,
    version="11.1.3",
    machine="pc-q35-11.1",
    name=None,
    running=True,
    ram_path=Path("/run/memory"),
    ram_size=6 << 30,
    ram_regions=(RamRegion(0, 2 << 30, 0), RamRegion(4 << 30, 4 << 30, 2 << 30)),
    qtest_socket="/run/qtest.sock",
    gateway_socket="/run/gateway.sock",
    apic_ids=(0, 1, 4),
    vcpus=2,
    memory_devices=(MemoryDevice("nvdimm", "n0", 8 << 30, 1 << 30),),
    dbus_address="unix:path=/run/dbus.sock",
    atomic=False,
)
OPTIONS = HostOptions(
    features=Features(stimer=True, stimer_direct=True, host_version=HostVersion(build=1, major=9)),
    max_version=Version.WIN10_RS5,
    hold_timeout=2.5,
    switchover=Switchover.OBSERVE,
    allow_missing_devices=True,
)


def sent(values: dict[str, Any]) -> dict[str, Any]:
    """As it arrives."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


@pytest.mark.parametrize("running", [True, False])
def test_facts_arrive_as_they_are(running: bool) -> None:
    assert read_facts(sent(facts_values(FACTS)), running=running) == dataclasses.replace(
        FACTS, running=running
    )


def test_options_arrive_as_they_are_but_for_those_of_the_beginning() -> None:
    options = dataclasses.replace(OPTIONS, takeover=True, reset=True)
    assert read_options(sent(options_values(options))) == OPTIONS


def test_what_another_release_adds_is_left_out_and_what_it_lacks_has_its_default() -> None:
    facts = sent(facts_values(FACTS)) | {"colour": "blue"}
    del facts["atomic"]
    assert read_facts(facts, running=True) == dataclasses.replace(FACTS, atomic=True)
    options = sent(options_values(OPTIONS)) | {"colour": "blue"}
    options["features"]["colour"] = "blue"
    del options["hold_timeout"]
    assert read_options(options) == dataclasses.replace(OPTIONS, hold_timeout=0.0)


@pytest.mark.parametrize("name", ["ram_path", "ram_regions", "apic_ids", "pid"])
def test_facts_that_lack_what_is_needed_are_refused(name: str) -> None:
    facts = sent(facts_values(FACTS))
    del facts[name]
    with pytest.raises(ReloadFailed, match="the description of QEMU cannot be read"):
        read_facts(facts, running=True)


@pytest.mark.parametrize(("name", "value"), [("max_version", 7), ("switchover", "never"), ("features", None)])
def test_options_that_are_not_known_here_are_refused(name: str, value: object) -> None:
    with pytest.raises(ReloadFailed, match="the options of the host cannot be read"):
        read_options(sent(options_values(OPTIONS)) | {name: value})
