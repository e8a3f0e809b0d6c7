"""The counters of `vmbus status` go on where another process has left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vmbus.errors import MalformedError
from vmbus.hypervisor.crash import CrashReport
from vmbus.machine.host import Host
from vmbus.machine.reload.figures import add_figures, figures
from vmbus.wire.msr import CrashControl
from vmbus_devices.scsi.controller import Controller

from tests.unit.machine.test_host_state import host

DEVICES = ("echo", "heartbeat", "scsi,format=memory,size=8M")


def work(here: Host) -> None:
    """As if a guest had been served."""
    here.service.traps, here.service.doorbells, here.interrupts.requests = 5, 6, 7
    here.events.resets = 1
    here.events.crashes.append(CrashReport((1, 2, 3, 4, 5), CrashControl(notify=True), "oops"))
    here.stopped_because.append("no room")
    here.problems.report("missing-devices", "a disk is missing")
    here.partition.synic.counters.messages_delivered = 8
    here.partition.hypercalls.counters.statuses[5] = 9
    here.bus.refusals.counts["gpadl-unknown-relid"] = 2
    for attached in here.devices:
        attached.io.counters.packets_in = 10
        attached.channel.counters.opens = 1
        attached.io.refusals.counts["short"] = 3
        if isinstance(attached.device, Controller):
            [unit] = attached.device.units.values()
            unit.statistics.began()
            unit.statistics.ended(0.25)
            unit.statistics.reads, unit.statistics.bytes_read = 1, 512
            unit.statistics.errors["3/11/00"] = 4


def seen(here: Host) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(figures(here)))
    return found


async def test_all_counters_arrive_and_are_added_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with host(tmp_path, *DEVICES) as here, host(tmp_path / "there", *DEVICES) as there:
        work(here)
        add_figures(there, seen(here))
        assert seen(there) == seen(here)
        [crash] = there.events.crashes
        assert crash == here.events.crashes[0]
        assert there.started == here.started
        work(there)  # which sets some, and adds to others
        controller = there.devices[2].device
        assert isinstance(controller, Controller)
        [unit] = controller.units.values()
        assert unit.statistics.requests == 2
        assert unit.statistics.latency.count == 2
        assert unit.statistics.latency.median == pytest.approx(0.25, rel=0.1)


async def test_a_device_that_is_new_and_a_counter_that_is_gone_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with host(tmp_path, "echo") as here, host(tmp_path / "there", "echo", "heartbeat") as there:
        work(here)
        values = seen(here)
        values["counters"]["synic"] = {"of_another_release": 4}
        values["devices"]["gone"] = {"x": 1}
        add_figures(there, values)
        assert there.partition.synic.counters.messages_delivered == 0
        assert there.devices[0].io.counters.packets_in == 10
        assert there.devices[1].io.counters.packets_in == 0


@pytest.mark.parametrize("broken", [{}, {"started": None}, {"counters": 3}, {"crashes": [1]}])
async def test_counters_that_are_none_are_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    with host(tmp_path, "echo") as here:
        values = seen(here) | broken if broken else {}
        with pytest.raises(MalformedError, match="cannot be read"):
            add_figures(here, values)
