"""What ``vmbus status`` shows a person."""

from __future__ import annotations

from typing import Any

import pytest
from vmbus.cli.status import disk_table, render


def channel(device: str, details: dict[str, Any]) -> dict[str, Any]:
    return {
        "relid": 1,
        "device": device,
        "state": "open",
        "target_vp": 0,
        "doorbells": 3,
        "interrupts": 4,
        "refusals": {},
        "details": details,
    }


def unit(**more: Any) -> dict[str, Any]:
    return {
        "size": 20 << 30,
        "reads": 12,
        "writes": 3,
        "flushes": 1,
        "bytes_read": 1536 << 10,
        "bytes_written": 700,
        "queue_depth": 2,
        "most_queue_depth": 32,
        "errors": {},
        "latency": {"count": 15, "median_us": 120.4, "p90_us": 2500.0, "p99_us": 1_200_000.0},
        "read_only": False,
        "backend": "file",
        "image": "disk.img",
        **more,
    }


def status(units: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "web",
        "vcpus": 2,
        "qemu": {"version": "11.1.3"},
        "partition": {"guest_os": "Linux 6.12", "refusals": {}},
        "bus": {"version": "5.3", "refusals": {}},
        "crashes": [],
        "channels": [channel("heartbeat", {}), channel("scsi", {"units": units})],
        **more,
    }


def test_a_disk_is_a_row() -> None:
    lines = disk_table(status({"0:1": unit()})).splitlines()
    assert " ".join(lines[0].split()) == (
        "disk size reads bytes writes bytes flushes depth median 90 % 99 % image errors"
    )
    assert lines[1].split("  ")[0] == "scsi/0:1"
    assert " ".join(lines[1].split()) == ("scsi/0:1 20G 12 1.5M 3 700 1 2 of 32 120 us 2.5 ms 1.2 s disk.img")


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({"format": "qcow2", "read_only": True}, "disk.img (qcow2, read-only)"),
        ({"errors": {"3/11/00": 2, "7/27/07": 1}}, "3/11/00 (2), 7/27/07 (1)"),
        ({"trouble": "Connection refused"}, "scsi/0:0: Connection refused"),
        ({"waits": 31.5}, "scsi/0:0: a request has waited for the server for 31.5 s"),
        (
            {"kept": {"requests": 2, "because": "a write failed: full"}},
            "a write failed: full; 2 requests wait",
        ),
    ],
)
def test_what_is_special_about_a_disk(more: dict[str, Any], shown: str) -> None:
    assert shown in disk_table(status({"0:0": unit(**more)}))


def test_a_guest_without_disks_has_no_table_of_them() -> None:
    assert disk_table(status({})) == ""
    assert "disk" not in render(status({}))


def test_a_stopped_guest_says_why_and_what_to_do() -> None:
    found = render(status({}, stopped_because=["disk d: a write failed: No space left on device"]))
    assert (
        "stopped: disk d: a write failed: No space left on device; remove the cause, then run `vmbus cont web`"
        in found
    )
