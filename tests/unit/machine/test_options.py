"""QEMU's options in their three forms, the ACPI table, and the files in ``qemu-config``."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree
from pathlib import Path

import pytest
from vmbus.errors import UsageError
from vmbus.machine.qemu import example
from vmbus.machine.qemu.acpi import HIGH_WINDOW, LOW_WINDOW, vmbus_table
from vmbus.machine.qemu.arguments import EmulatorOptions, libvirt, readconfig
from vmbus.machine.qemu.launch import GuestOptions, command_line
from vmbus.machine.rundir import RunDirectory

QEMU_CONFIG = Path(__file__).parents[3] / "qemu-config"


def options(path: str = "/run/x") -> EmulatorOptions:
    return EmulatorOptions(
        memory_path=Path(path) / "memory",
        memory_size=512 << 20,
        gateway_library=Path("/lib/vmbus-gateway.so"),
        gateway_socket=Path(path) / "gateway.sock",
        qtest_socket=Path(path) / "qtest.sock",
        qmp_socket=Path(path) / "qmp.sock",
        acpi_table=Path(path) / "vmbus.aml",
    )


def test_commas_in_paths_are_doubled() -> None:
    line = options("/run/a,b").argv()
    assert "memory-backend-file,id=vmbus-ram,mem-path=/run/a,,b/memory,share=on,size=512M" in line


def test_a_table_that_qemu_would_take_for_two_is_refused() -> None:
    """``-acpitable`` takes a list of files, separated by colons."""
    with pytest.raises(UsageError, match="colon"):
        options("/run/a:b").argv()


def test_qemu_s_command_line_escapes_every_name(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a,b" / "web", tmp_path / "a,b" / "web" / "memory")
    guest = GuestOptions(kernel=Path("/k"), initrd=None, append="", command_port=True)
    words = command_line(["qemu"], directory, options(str(directory.path)), guest)
    assert [word for word in words if "a,b" in word] == []
    assert f"unix:{tmp_path}/a,,b/web/qmp.sock,server=on,wait=off" in words


def test_no_option_is_one_that_qemu_warns_of() -> None:
    assert "-mon" not in options().argv()


def test_readconfig_and_the_rest_hold_every_option_once() -> None:
    listed = options().options()
    text, rest = readconfig(listed)
    sections = [option for option in listed if option.section]
    assert text.count("[") == len(sections)
    assert len(rest) == 2 * (len(listed) - len(sections))


def test_the_libvirt_form_is_xml_with_the_same_words() -> None:
    text = libvirt(options("/run/a&b").options())
    body = text.split("-->\n", 1)[1]
    root = xml.etree.ElementTree.fromstring(body.replace("qemu:", ""))
    assert [child.get("value") for child in root] == options("/run/a&b").argv()


@pytest.mark.parametrize("name", sorted(example.files()))
def test_the_files_in_qemu_config_are_in_step_with_their_source(name: str) -> None:
    assert (QEMU_CONFIG / name).read_bytes() == example.files()[name], (
        "run `python -m vmbus.machine.qemu.example qemu-config` after a change"
    )


def test_the_acpi_table_has_a_right_checksum_and_length() -> None:
    table = vmbus_table()
    assert sum(table) & 0xFF == 0
    assert int.from_bytes(table[4:8], "little") == len(table)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (package acpica-tools) is not installed")
def test_the_acpi_source_compiles_to_the_table(tmp_path: Path) -> None:
    subprocess.run(
        ["iasl", "-f", "-p", str(tmp_path / "out"), str(QEMU_CONFIG / "vmbus.asl")],
        check=False,  # it complains about the five-character hardware id, and emits the table
        capture_output=True,
    )
    compiled = (tmp_path / "out.aml").read_bytes()
    # The header ends with the compiler's own version, which enters the checksum too.
    assert compiled[36:] == vmbus_table()[36:]
    assert compiled[:9] + compiled[10:32] == vmbus_table()[:9] + vmbus_table()[10:32]


def test_the_bus_is_in_a_device_with_memory_windows_below_and_above_4_gib() -> None:
    """Linux 5.10 walks up from the bus until it finds one, and crashes at the root of the namespace."""
    table = vmbus_table()
    module, bus = table.index(b"\x5b\x82"), table.rindex(b"\x5b\x82")
    assert table.index(b"VMOD") == module + 4 and table.index(b"VMBS") > bus > module
    lead, more = table[module + 2 : module + 4]
    assert lead >> 6 == 1 and module + 2 + (lead & 15 | more << 4) == len(table), "the bus is inside"
    windows = []
    for tag, width in ((b"\x87\x17\x00", 4), (b"\x8a\x2b\x00", 8)):
        at = table.index(tag, module, bus)
        assert table[at + 3 : at + 6] == b"\0\x0c\x01"  # memory, produced, fixed, writable
        fields = [
            int.from_bytes(
                table[at + 6 + width * each :][:width], "little"
            )  # granularity, first, last, offset, size
            for each in range(5)
        ]
        assert fields[0] == fields[3] == 0 and fields[2] - fields[1] + 1 == fields[4]
        windows.append((fields[1], fields[4]))
    assert windows == [LOW_WINDOW, HIGH_WINDOW]
    assert sum(HIGH_WINDOW) <= 1 << 40 and sum(LOW_WINDOW) < 0xFEFF_C000
