"""Reboot, kexec, module reload, panic, vCPU offline: afterwards the bus is clean and works."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from vmbus.hypervisor.features import Features
from vmbus.machine.host import ExitReason, HostOptions
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import find_kernel

from tests.guest.harness import LOADED_MODULES, boot
from tests.guest.matrix import full
from tests.guest.test_boot import complaints

pytestmark = pytest.mark.guest

DEVICES = "$(ls /sys/bus/vmbus/devices | wc -l)"
"""Shell: how many the guest has found."""


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("reboots", [1, full(2)])
async def test_a_reboot_inside_one_qemu(tmp_path: Path, reboots: int) -> None:
    async with boot(tmp_path) as guest:
        await guest.until(lambda: guest.host.partition.guest_os_id, "the first boot")
        await guest.more_beats()
        for _ in range(reboots):
            before = guest.host.events.resets
            assert await guest.shut_down("restart") == "ok"
            # Linux tries several ways to reset a machine; QEMU may tell of more than one.
            await guest.until(lambda: guest.host.events.resets > before, "the reset")
            await guest.until(lambda: guest.host.bus.status()["version"] is None, "a clean bus")
            assert guest.host.bus.status()["gpadls"] == 0
            await guest.until(lambda: guest.channel("heartbeat")["state"] == "open", "the next boot")
            await guest.more_beats()
        assert guest.host.bus.status()["gpadls"] == 3
        assert complaints(guest.console()) == []


def second_kernel(words: str) -> tuple[list[tuple[Path, str]], str]:
    """Files for a guest that starts a second kernel, and that kernel's command line."""
    kernel = find_kernel("debian-6.12")
    initramfs = build_initramfs(kernel, modules=LOADED_MODULES, command=[words])
    return [(kernel.vmlinuz, "/vmlinuz"), (initramfs, "/initrd")], " ".join(KERNEL_ARGUMENTS)


@pytest.mark.full  # the test of the crash kernel starts a second kernel, too
async def test_kexec_into_a_second_kernel(tmp_path: Path, guest_program: Callable[[str], Path]) -> None:
    added, line = second_kernel(
        "echo second kernel: $(ls /sys/bus/vmbus/devices | wc -l) devices; read line </dev/ttyS1"
    )

    async with boot(
        tmp_path,
        memory=1024,
        add=[(guest_program("kexec"), "/bin/kexec"), *added],
        command=[f"echo first; kexec /vmlinuz /initrd '{line}'"],
    ) as guest:
        await guest.more_beats()
        await guest.says("second kernel: 3 devices")
        await guest.more_beats()
        assert guest.host.events.resets == 0
        await guest.until(lambda: guest.host.bus.status()["gpadls"] == 3, "all GPADLs")
        guest.tell("enough")
        assert await guest.finish() == 0
        assert complaints(guest.console()) == []


async def test_a_crash_kernel_connects_after_a_panic(
    tmp_path: Path, guest_program: Callable[[str], Path]
) -> None:
    added, line = second_kernel(
        "echo crash kernel: $(ls /sys/bus/vmbus/devices | wc -l) devices; read line </dev/ttyS1"
    )

    async with boot(
        tmp_path,
        memory=1024,
        smp=2,
        append="crashkernel=320M",
        add=[(guest_program("kexec"), "/bin/kexec"), *added],
        may_panic=True,
        command=[
            f"kexec -p /vmlinuz /initrd '{line} nr_cpus=1' && echo loaded && echo c > /proc/sysrq-trigger"
        ],
    ) as guest:
        await guest.until(lambda: guest.host.events.crashes, "a crash report")
        await guest.says("crash kernel: 3 devices")
        await guest.until(lambda: guest.host.bus.status()["gpadls"] == 3, "all GPADLs")
        guest.tell("enough")
        assert await guest.finish() == 0


@pytest.mark.parametrize("times", [10, full(50)])
async def test_every_driver_is_unloaded_and_loaded_again_and_again(tmp_path: Path, times: int) -> None:
    script = (
        f"for i in $(seq {times}); do rmmod hv_utils; rmmod hv_vmbus || exit 1; "
        "modprobe hv_vmbus && modprobe hv_utils || exit 2; echo round $i; done"
    )

    async with boot(tmp_path, command=[script]) as guest:
        await guest.says("round 3\n")
        await guest.until(lambda: guest.host.bus.status()["gpadls"] == 3, "all GPADLs of the present round")
        before = descriptors()
        await guest.says(f"round {times}\n")
        assert descriptors() <= before
        assert await guest.finish() == 0
        assert complaints(guest.console()) == []
        assert guest.channel("heartbeat")["opens"] >= times + 1
        assert guest.status()["bus"]["gpadls"] <= 3


async def test_a_panic_unloads_the_bus_and_reports_five_parameters(tmp_path: Path) -> None:
    async with boot(
        tmp_path, command=["echo ready; echo c > /proc/sysrq-trigger"], append="panic=0", may_panic=True
    ) as guest:
        await guest.until(lambda: guest.host.events.crashes, "a crash report")
        report = guest.host.events.crashes[0]
        assert len(report.parameters) == 5
        assert report.message is not None and "sysrq triggered crash" in report.message
        await guest.until(lambda: guest.host.bus.status()["version"] is None, "the bus to be unloaded")
        assert guest.host.bus.status()["gpadls"] == 0


async def test_a_cpu_with_bound_channels_is_moved_from_or_refused(tmp_path: Path) -> None:
    script = (
        "echo ready; read line </dev/ttyS1; "
        "echo 0 > /sys/devices/system/cpu/cpu1/online; cat /sys/devices/system/cpu/online; "
        "echo 1 > /sys/devices/system/cpu/cpu1/online; cat /sys/devices/system/cpu/online; "
        "echo 0 > /sys/devices/system/cpu/cpu0/online; echo last: $(cat /sys/devices/system/cpu/online) .; "
        "read line </dev/ttyS1"
    )

    async with boot(tmp_path, smp=2, command=[script]) as guest:
        await guest.says("ready")
        await guest.more_beats()
        guest.tell("begin")
        await guest.says("last: ")
        await guest.says(" .")
        await guest.more_beats()
        assert b"last: 0-1 ." in guest.output, guest.tail()
        guest.tell("enough")
        assert await guest.finish() == 0
        assert complaints(guest.console()) == []


@pytest.mark.parametrize("timers", [full("message"), "direct"])
async def test_synthetic_timers_drive_a_guest(tmp_path: Path, timers: str) -> None:
    async with boot(
        tmp_path,
        smp=2,
        host_options=HostOptions(features=Features(stimer=True, stimer_direct=timers == "direct")),
        command=[
            "cat /sys/devices/system/clockevents/clockevent0/current_device; "
            "for i in 1 2 3 4 5; do sleep 0.2; done; echo slept"
        ],
    ) as guest:
        assert await guest.finish() == 0
        assert b"Hyper-V clockevent" in guest.output, guest.tail()
        assert b"slept" in guest.output


async def test_a_guest_that_uses_auto_eoi(tmp_path: Path) -> None:
    """In xAPIC mode: the gateway reaches the local APIC through its memory page."""
    async with boot(
        tmp_path,
        host_options=HostOptions(features=Features(deprecate_auto_eoi=False)),
        smp=2,
        append="nox2apic",
    ) as guest:
        await guest.until(lambda: guest.channel("heartbeat")["state"] == "open", "the channel")
        await guest.more_beats(20)
        sints = guest.status()["partition"]["vps"][0]["sints"]
        assert sints["2"]["auto_eoi"] is True
        assert guest.status()["problems"] == []


async def test_qemu_killed_leaves_nothing(tmp_path: Path) -> None:
    before = descriptors()
    async with boot(tmp_path) as guest:
        await guest.more_beats()
        directory, memory = guest.guest.directory.path, guest.guest.directory.memory
        guest.guest.process.process.kill()
        assert await guest.exit_reason() is ExitReason.QEMU_GONE
    assert not directory.exists()
    assert not memory.exists()
    assert descriptors() <= before


async def test_a_hot_added_vcpu_has_its_synic(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The program itself starts QEMU with ``maxcpus=2``. Linux has message pages for the vCPUs of its boot only."""
    async with boot(tmp_path) as guest:
        await guest.more_beats()
        assert len(guest.status()["partition"]["vps"]) == guest.status()["vcpus"] == 1
        qmp = guest.host.qmp
        (slot,) = [each for each in await qmp.execute("query-hotpluggable-cpus") if "qom-path" not in each]
        await qmp.execute("device_add", {"driver": slot["type"], "id": "added", **slot["props"]})
        assert await guest.shut_down("restart") == "ok"
        await guest.until(lambda: guest.host.events.resets, "the reset")
        await guest.until(lambda: guest.host.bus.status()["gpadls"] == 3, "the next boot")
        await guest.more_beats()
        vps = guest.status()["partition"]["vps"]
        assert [vp["synic_enabled"] and vp["message_page"] is not None for vp in vps] == [True, True]
        assert guest.status()["vcpus"] == 2
        assert complaints(guest.console()) == []
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_ram_that_is_plugged_into_a_running_guest_is_named(tmp_path: Path) -> None:
    async with boot(tmp_path, extra=["-m", "slots=1,maxmem=2G"]) as guest:
        await guest.more_beats()
        assert guest.status()["problems"] == []
        qmp = guest.host.qmp
        await qmp.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m", "size": 128 << 20})
        await qmp.execute("device_add", {"driver": "pc-dimm", "id": "more", "memdev": "m"})
        await guest.until(lambda: guest.status()["problems"], "the problem to be named")
        (problem,) = guest.status()["problems"]
        assert "more (dimm, 128 MiB at" in problem
