"""Unmodified kernels boot, find Hyper-V, connect VMBus and keep their integration components going."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement
from vmbus.machine import guest as guest_module
from vmbus.machine.host import HostOptions
from vmbus.provision.kernel import find_kernel
from vmbus.wire.version import Version

from tests.guest.harness import boot, nothing_lost
from tests.guest.matrix import full

pytestmark = pytest.mark.guest

KERNELS = ("debian-6.1", "debian-6.12", "debian-backports")

OLD_KERNEL = "debian-5.10"
"""Walks up the ancestors of the ACPI device for a memory window. Old releases leave the mirrors at some time."""

# What must not stand in a kernel log: complaints that our side caused. Linux 5.10 notes that there is no framebuffer.
COMPLAINTS = re.compile(
    r"unchecked MSR|WARNING:|BUG:|Call Trace|general protection"
    r"|hv_vmbus:(?!.*framebuffer mmio base of zero).*(?:error|fail|unexpected)"
    r"|hv_utils:.*(?:error|fail)|soft lockup|rcu.*stall",
    re.IGNORECASE,
)

ORDINARY = {
    ("debian-5.10", 2, "pc"),
    ("debian-6.1", 1, "q35"),
    ("debian-6.1", 4, "pc"),
    ("debian-6.12", 4, "q35"),
    ("debian-backports", 2, "q35"),
}
"""Each kernel, number of vCPUs, machine, and size of memory at least once."""

# Every kernel × vCPUs × machine; memory and address randomisation vary along the way.
MATRIX = [
    pytest.param(
        kernel,
        smp,
        machine,
        memory,
        append,
        marks=() if (kernel, smp, machine) in ORDINARY else pytest.mark.full,
        id=f"{kernel}-{smp}vcpu-{machine}-{memory}M{append and '-nokaslr'}",
    )
    for (kernel, smp, machine), (memory, append) in zip(
        [
            (kernel, smp, machine)
            for kernel in (OLD_KERNEL, *KERNELS)
            for smp in (1, 2, 4)
            for machine in ("q35", "pc")
        ],
        [(256, ""), (6144, "nokaslr"), (1024, "nokaslr"), (512, ""), (6144, ""), (3072, "nokaslr")] * 4,
        strict=True,
    )
]


def complaints(console: str) -> list[str]:
    return [line for line in console.splitlines() if COMPLAINTS.search(line)]


@pytest.mark.parametrize(("kernel", "smp", "machine", "memory", "append"), MATRIX)
async def test_a_kernel_boots_connects_and_keeps_its_heartbeat(
    tmp_path: Path, kernel: str, smp: int, machine: str, memory: int, append: str
) -> None:
    if kernel == OLD_KERNEL:
        try:
            find_kernel(kernel)
        except MissingRequirement as error:
            pytest.skip(str(error))
    async with boot(
        tmp_path,
        kernel=kernel,
        smp=smp,
        machine=machine,
        memory=memory,
        append=append,
        devices=("heartbeat,interval=0.1", "shutdown", "timesync"),
        extra=("-rtc", "base=2001-02-03T04:05:06"),
        compressed=True,
        command=["while :; do date -u +%s; usleep 100000; done"],
    ) as guest:
        await guest.until(lambda: guest.host.bus.status()["version"], "agreed version")
        await guest.until(
            lambda: [c["state"] for c in guest.status()["channels"]] == ["open"] * 3,
            "three open channels",
        )
        await guest.until(lambda: guest.channel("heartbeat")["details"]["answers"] >= 10, "ten heartbeats")
        await guest.until(lambda: guest.output.count(b"\n") > 2, "the guest's clock")

        found = guest.status()
        console = guest.console()
        assert "Hypervisor detected: Microsoft Hyper-V" in console, console
        assert found["bus"]["version"] in (("5.2",) if kernel == OLD_KERNEL else ("5.3", "6.0"))
        assert str(found["partition"]["guest_os"]).startswith("Linux ")
        assert len(found["partition"]["vps"]) == smp
        assert all(vp["synic_enabled"] for vp in found["partition"]["vps"])
        assert found["bus"]["gpadls"] == 3
        assert found["posts"] >= 2 * 3, "the messages that share and open rings are posted"
        assert found["partition"]["refusals"] == {}
        assert found["bus"]["refusals"] == {}
        assert all(channel["refusals"] == {} for channel in found["channels"])
        assert nothing_lost(guest)

        def clock() -> int:
            return int(guest.output.split(b"\n")[-2])

        await guest.until(lambda: abs(clock() - time.time()) < 5, "clock set by time synchronisation")
        assert await guest.shut_down() == "ok"
        await guest.finish()
        assert complaints(guest.console()) == []


@pytest.mark.parametrize(
    "version", [Version.WIN8, full(Version.WIN8_1), full(Version.WIN10), Version.WIN10_RS3_1]
)
async def test_a_guest_takes_the_newest_version_that_is_offered(tmp_path: Path, version: Version) -> None:
    async with boot(tmp_path, host_options=HostOptions(max_version=version)) as guest:
        await guest.until(lambda: guest.host.bus.status()["version"], "agreed version")
        await guest.until(lambda: guest.channel("heartbeat")["details"]["answers"] >= 3, "three heartbeats")
        assert guest.host.bus.status()["version"] == str(version)


async def test_a_guest_that_prints_without_end_fills_nothing_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = 4096
    monkeypatch.setattr(guest_module, "_KEPT_SERIAL", keep, raising=False)
    flood = "i=0; while [ $i -lt 3000 ]; do echo flooding the console $i; i=$((i+1)); done; echo the end"
    async with boot(tmp_path, memory=256, command=[f"{{ {flood}; }} >/dev/console"]) as guest:
        largest = 0

        def flooded() -> bool:
            nonlocal largest
            largest = max(largest, guest.console_path.stat().st_size)
            return guest.received.status is not None

        await guest.until(flooded, "end of the flood")
        await guest.finish()
        assert largest <= 3 * keep
        console = guest.console()
        assert "bytes are left out here" in console
        assert console.startswith("[    0.")
        assert "the end" in console[-keep:]
