"""The ``--device`` lines that make the disks of a controller again, whatever came and went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from device.registry import Registry, join_device, split_device
from device.scsi import Scsi
from emulator.errors import UsageError

registry = Registry()


def places(device: Scsi) -> dict[tuple[int, int], tuple[str, str]]:
    return {
        place: (unit.identity.serial, str(unit.backend.status().get("image")))
        for place, unit in device.units.items()
    }


def made(lines: Sequence[str]) -> Scsi:
    [device] = registry.create_all(lines)
    assert isinstance(device, Scsi)
    return device


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{number},.img" for number in range(3)]
    for each in found:
        each.write_bytes(bytes(4096))
    return found


def test_lines_are_taken_apart_and_put_together() -> None:
    text = "scsi,image=a,,b,serial=x"
    assert join_device(*split_device(text)) == text


def test_disks_keep_places_and_serials_when_one_before_them_has_gone(images: list[Path]) -> None:
    lines = [f"scsi,image={str(each).replace(',', ',,')},cache=writeback" for each in images]
    device = made(lines)
    assert sorted(device.units) == [(0, 0), (0, 1), (0, 2)]
    device.detach(0, 0)
    again = made(device.lines())
    assert places(again) == places(device)
    assert [serial for serial, _ in places(again).values()] == ["scsi-0-1", "scsi-0-2"]
    device.join(registry.create("scsi,target=1,lun=7,serial=far,format=memory,size=1M"))
    assert places(made(device.lines())) == places(device)
    for each in (device, again):
        each.stop()


def test_a_controller_without_disks_is_made_again_as_it_was() -> None:
    device = made(["scsi,id=data,controller=c,queues=2,transfer=64,version=6.0,format=memory,size=1M,lun=5"])
    device.detach(0, 5)
    again = made(device.lines())
    assert (
        again.name,
        again.controller,
        again.queues,
        again.max_transfer,
        again.max_version,
        again.units,
    ) == (
        "data",
        "c",
        2,
        64 << 10,
        device.max_version,
        {},
    )
    assert again.instance == device.instance


def test_a_place_that_is_taken_costs_only_the_newcomer() -> None:
    device = made(["scsi,format=memory,size=1M"])
    with pytest.raises(UsageError, match="taken"):
        device.join(registry.create("scsi,format=memory,size=1M,lun=0"))
    assert places(device) == {(0, 0): ("scsi-0-0", "None")}
