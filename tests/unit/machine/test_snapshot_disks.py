"""What a snapshot does not hold: it is named, whoever has it, before anything is saved or given up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.devices.registry import Registry
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.snapshots import SnapshotFailed
from vmbus.machine.migration.state_machine import Phase
from vmbus_devices.scsi.controller import Controller

SNAPSHOT_IMAGE = {
    "drv": "qcow2",
    "ro": False,
    "node-name": "vmbus-snapshots",
    "file": "snapshots.qcow2",
    "image": {"filename": "snapshots.qcow2", "snapshots": []},
}


def coordinator(*, drives: list[dict[str, Any]], ours: tuple[str, ...] = ()) -> Coordinator:
    """Return one of a QEMU with an image for snapshots and with ``drives``; it fails at what follows the check."""

    async def execute(command: str, arguments: object = None) -> list[dict[str, Any]]:
        return {"query-named-block-nodes": [SNAPSHOT_IMAGE], "query-block": drives}[command]

    return cast(
        "Coordinator",
        SimpleNamespace(
            phase=Phase.IDLE,
            command="",
            ports=SimpleNamespace(dbus_address="unix:path=bus", qmp=SimpleNamespace(execute=execute)),
            state=SimpleNamespace(outside_snapshots=lambda: list(ours)),
        ),
    )


def drive(node: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"device": "virtio0", "inserted": {"node-name": node, "ro": read_only, "file": "other.raw"}}


@pytest.mark.parametrize("action", [snapshots.save, snapshots.load])
async def test_what_the_guest_can_write_to_is_named(action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_check_is_meant", lambda *words, **more: None)
    for found, told in (
        (coordinator(drives=[], ours=("scsi/0:0 (disk.img)",)), r"scsi/0:0 \(disk\.img\)"),
        (coordinator(drives=[drive("raw0")]), r"QEMU's virtio0 \(other\.raw\)"),
    ):
        with pytest.raises(SnapshotFailed, match=f"{told}.*--without-disks"):
            await action(found, "one")


async def test_the_rest_goes_on_to_the_next_check() -> None:
    """Read-only disks, empty drives, images that take part, and all disks with ``without_disks``."""
    read_only = [drive("raw0", read_only=True), {"device": "cd0"}, drive("vmbus-snapshots")]
    for found, words in (
        (coordinator(drives=read_only), {}),
        (coordinator(drives=[drive("raw0")], ours=("disk",)), {"without_disks": True}),
    ):
        with pytest.raises(
            KeyError
        ):  # the fake QEMU knows no migration capabilities, which are asked for next
            await snapshots.save(found, "one", **words)


def test_a_controller_names_the_disks_in_memory_that_were_written_to() -> None:
    controller = Registry().create("scsi,format=memory,size=1M")
    assert isinstance(controller, Controller)
    assert controller.bound_to_process() == []
    controller.units[0, 0].backend.write(0, [memoryview(bytes(512))])
    [found] = controller.bound_to_process()
    assert found.startswith("scsi/0:0 (scsi,format=memory,size=1M,")


def test_a_controller_names_its_writable_disks() -> None:
    controller = Registry().create("scsi,format=memory,size=1M")
    [found] = controller.outside_snapshots()
    assert found.startswith("scsi/0:0 (scsi,format=memory,size=1M,")
    assert Registry().create("scsi,format=memory,size=1M,readonly=on").outside_snapshots() == []
    assert Registry().create("heartbeat").outside_snapshots() == ()
