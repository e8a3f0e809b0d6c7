"""What is read from a running QEMU, on texts that QEMU printed."""

from __future__ import annotations

from vmbus.machine.memory import RamRegion
from vmbus.machine.qemu.discovery import chardev_path, parse_layout, plugin_socket, possible_apic_ids

Q35_6GIB = """\
FlatView #1
 AS "memory", root: system
 Root memory region: system
  0000000000000000-00000000000c2fff (prio 0, ram): ram
  00000000000c3000-00000000000e7fff (prio 0, rom): ram @00000000000c3000
  00000000000e8000-00000000000effff (prio 0, ram): ram @00000000000e8000
  00000000000f0000-00000000000fffff (prio 0, rom): ram @00000000000f0000
  0000000000100000-000000007fffffff (prio 0, ram): ram @0000000000100000
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  0000000100000000-00000001ffffffff (prio 0, ram): ram @0000000080000000
"""

Q35_SMM = """\
FlatView #0
 AS "cpu-smm-0", root: memory
 AS "cpu-smm-1", root: memory
 Root memory region: memory
  0000000000000000-00000000000fffff (prio 0, ram): ram
  0000000000100000-000000007fffffff (prio 0, ram): ram @0000000000100000
  0000000100000000-00000001ffffffff (prio 0, ram): ram @0000000080000000
FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000fffff (prio 1, rom): ram @00000000000c0000
  0000000000100000-000000007effffff (prio 0, ram): ram @0000000000100000
  000000007f000000-000000007fffffff (prio 1, i/o): tseg-blackhole
  0000000100000000-00000001ffffffff (prio 0, ram): ram @0000000080000000
FlatView #2
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
"""
"""What QEMU prints when firmware has reserved 16 MiB for System Management Mode (shortened)."""


def test_ram_is_split_at_four_gib() -> None:
    assert parse_layout(Q35_6GIB, "ram") == (
        RamRegion(gpa=0, size=0xA0000, offset=0),
        RamRegion(gpa=1 << 20, size=(2 << 30) - (1 << 20), offset=1 << 20),
        RamRegion(gpa=4 << 30, size=4 << 30, offset=2 << 30),
    )


def test_memory_of_system_management_mode_is_no_ram() -> None:
    """Neither in the old window nor at the end of low memory, although the views of processors have it."""
    assert parse_layout(Q35_SMM, "ram") == (
        RamRegion(gpa=0, size=0xA0000, offset=0),
        RamRegion(gpa=1 << 20, size=0x7F000000 - (1 << 20), offset=1 << 20),
        RamRegion(gpa=4 << 30, size=4 << 30, offset=2 << 30),
    )


def test_another_regions_lines_are_not_ram() -> None:
    assert parse_layout(Q35_6GIB, "other") == ()


def test_the_gateway_socket_is_found_on_the_command_line() -> None:
    line = [
        "ld.so",
        "qemu",
        "-plugin",
        "/opt/lib/vmbus-gateway-1a.so,socket=/run/a,,b.sock,wait=on",
        "-m",
        "1G",
    ]
    assert plugin_socket(line) == "/run/a,b.sock"
    assert plugin_socket(["qemu", "-plugin", "file=/x/vmbus-gateway.so,socket=rel.sock"]) == "rel.sock"
    assert plugin_socket(["qemu", "-plugin", "/x/libhotblocks.so,socket=s"]) is None
    assert plugin_socket(["qemu", "-plugin"]) is None


def test_a_chardev_tells_its_path_whether_somebody_is_connected_or_not() -> None:
    assert chardev_path("disconnected:unix:/run/q.sock,server=on") == "/run/q.sock"
    assert chardev_path("unix:/run/q.sock,server=on") == "/run/q.sock"
    assert chardev_path("vc") is None


def places(sockets: int, cores: int, threads: int) -> list[dict[str, int]]:
    """As QEMU lists them: the last processor first."""
    return [
        {"socket-id": socket, "core-id": core, "thread-id": thread}
        for socket in range(sockets)
        for core in range(cores)
        for thread in range(threads)
    ][::-1]


def test_apic_ids_of_vcpus_that_may_be_added_follow_from_their_places() -> None:
    smp = {"sockets": 2, "cores": 3, "threads": 2}
    wanted = (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13)
    assert possible_apic_ids({0: 0, 6: 8}, places(2, 3, 2), smp) == wanted


def test_an_unknown_numbering_leaves_the_vcpus_that_exist() -> None:
    smp = {"sockets": 1, "cores": 4, "threads": 1}
    assert possible_apic_ids({1: 16, 0: 0}, places(1, 4, 1), smp) == (0, 16)
