"""A real QEMU takes the options in each of their forms, and tells everything that an emulator has to know."""

from __future__ import annotations

import xml.etree.ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from vmbus.errors import QemuUnsuitable
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.qemu.acpi import vmbus_table
from vmbus.machine.qemu.arguments import EmulatorOptions, libvirt, readconfig
from vmbus.machine.qemu.discovery import QemuFacts, discover
from vmbus.machine.qemu.launch import QemuProcess
from vmbus.provision.qemu import find_qemu

pytestmark = pytest.mark.qemu

LIMIT = 120.0


def options(folder: Path, mebibytes: int = 128) -> EmulatorOptions:
    table = folder / "vmbus.aml"
    table.write_bytes(vmbus_table())
    return EmulatorOptions(
        memory_path=folder / "memory",
        memory_size=mebibytes << 20,
        gateway_library=gateway_build.build(),
        gateway_socket=folder / "gateway.sock",
        qtest_socket=folder / "qtest.sock",
        qmp_socket=folder / "qmp.sock",
        acpi_table=table,
    )


@contextmanager
def qemu(folder: Path, words: Sequence[str]) -> Iterator[QemuProcess]:
    """Start a QEMU whose vCPUs have not been started."""
    binary = find_qemu()
    line = [*binary.argv_prefix, "-S", "-nodefaults", "-no-user-config", "-display", "none", *words]
    process = QemuProcess.start(line, folder / "qemu.log", binary.environment)
    try:
        yield process
    finally:
        process.stop()


async def facts(process: QemuProcess, folder: Path) -> QemuFacts:
    qmp = await process.connect_qmp(folder / "qmp.sock", LIMIT)
    try:
        return await discover(qmp)
    finally:
        await qmp.close()


@pytest.mark.parametrize("form", ["argv", "readconfig", "libvirt"])
async def test_every_form_makes_a_qemu_that_can_be_attached_to(tmp_path: Path, form: str) -> None:
    wanted = options(tmp_path)
    words = wanted.argv()
    if form == "readconfig":
        text, rest = readconfig(wanted.options())
        (tmp_path / "vmbus.cfg").write_text(text)
        words = ["-readconfig", str(tmp_path / "vmbus.cfg"), *rest]
    elif form == "libvirt":
        body = libvirt(wanted.options()).split("-->\n", 1)[1].replace("qemu:", "")
        words = [child.get("value", "") for child in xml.etree.ElementTree.fromstring(body)]
    with qemu(tmp_path, ["-machine", "q35", *words]) as process:
        found = await facts(process, tmp_path)
    assert found.ram_path == wanted.memory_path
    assert found.ram_size == wanted.memory_size
    assert found.gateway_socket == str(wanted.gateway_socket)
    assert found.qtest_socket == str(wanted.qtest_socket)
    assert found.apic_ids == (0,)
    assert found.vcpus == 1
    assert not found.running


@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize("mebibytes", [64, 2048, 3584, 6144])
async def test_the_layout_of_ram_is_found(tmp_path: Path, machine: str, mebibytes: int) -> None:
    with qemu(tmp_path, ["-machine", machine, "-smp", "3", *options(tmp_path, mebibytes).argv()]) as process:
        found = await facts(process, tmp_path)
    first, low, *high = found.ram_regions
    assert (first.gpa, first.offset, first.end) == (0, 0, 0xA0000)
    assert low.gpa == 1 << 20 and low.offset == 1 << 20 and low.end <= 4 << 30
    assert sum(region.size for region in found.ram_regions) == (mebibytes << 20) - 0x60000
    if high:
        assert (high[0].gpa, high[0].offset) == (4 << 30, low.end)
    assert bool(high) == (mebibytes >= 3584)
    assert len(found.apic_ids) == found.vcpus == 3


@pytest.mark.parametrize(
    ("smp", "apic_ids"),
    [
        ("1,maxcpus=2", (0, 1)),
        ("2,maxcpus=6,sockets=2,cores=3,threads=1", (0, 1, 2, 4, 5, 6)),
        ("3,maxcpus=12,sockets=2,dies=2,cores=3,threads=1", (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14)),
    ],
)
async def test_vcpus_that_may_be_added_are_known(tmp_path: Path, smp: str, apic_ids: tuple[int, ...]) -> None:
    with qemu(tmp_path, ["-machine", "q35", "-smp", smp, *options(tmp_path).argv()]) as process:
        found = await facts(process, tmp_path)
    assert found.apic_ids == apic_ids
    assert found.vcpus == int(smp[0])


async def test_icount_is_refused_with_several_vcpus_only(tmp_path: Path) -> None:
    words = ["-machine", "q35", "-icount", "shift=auto", *options(tmp_path).argv()]
    with (
        qemu(tmp_path, ["-smp", "2", *words]) as process,
        pytest.raises(QemuUnsuitable, match="2 vCPUs with -icount"),
    ):
        await facts(process, tmp_path)
    with qemu(tmp_path, ["-smp", "1,maxcpus=2", *words]) as process:
        assert (await facts(process, tmp_path)).vcpus == 1


@pytest.mark.parametrize(
    "device",
    [
        ("pc-dimm,id=more,memdev=other", "more (dimm, 64 MiB at 0x100000000)"),
        ("virtio-mem-pci,id=more,memdev=other,requested-size=16M", "more (virtio-mem, 16 MiB at 0x1"),
    ],
)
async def test_ram_outside_the_memory_backend_is_refused(tmp_path: Path, device: tuple[str, str]) -> None:
    words = options(tmp_path).argv()
    more = [
        "-m",
        "slots=2,maxmem=1G",
        "-object",
        "memory-backend-ram,id=other,size=64M",
        "-device",
        device[0],
    ]
    with (
        qemu(tmp_path, ["-machine", "q35", *words, *more]) as process,
        pytest.raises(QemuUnsuitable) as refused,
    ):
        await facts(process, tmp_path)
    assert device[1] in str(refused.value)
    assert "-m SIZE" in str(refused.value)


async def test_persistent_memory_is_no_ram(tmp_path: Path) -> None:
    words = options(tmp_path).argv()
    more = ["-m", "slots=2,maxmem=1G", "-object", "memory-backend-ram,id=other,size=64M"]
    more += ["-device", "virtio-pmem-pci,id=disk,memdev=other"]
    with qemu(tmp_path, ["-machine", "q35", *words, *more]) as process:
        found = await facts(process, tmp_path)
    assert [(device.kind, device.name) for device in found.memory_devices] == [("virtio-pmem", "disk")]


async def test_each_missing_option_is_named_alone(tmp_path: Path) -> None:
    words = options(tmp_path).argv()
    at = words.index("-qtest")
    del words[at : at + 2]
    with qemu(tmp_path, words) as process, pytest.raises(QemuUnsuitable) as refused:
        await facts(process, tmp_path)
    assert "-qtest unix:" in str(refused.value)
    assert "-plugin PATH" not in str(refused.value)
    assert "memory-backend-file" not in str(refused.value)
