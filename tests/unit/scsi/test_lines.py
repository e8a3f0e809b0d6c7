"""The ``--device`` lines that make the disks of a controller again, whatever came and went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from vmbus.devices.line import join_device, split_device
from vmbus.devices.registry import Registry
from vmbus.errors import UsageError
from vmbus_devices.scsi import Scsi

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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("size=1G", "size="),
        ("media=cdrom", "media="),
        ("readonly=on,serial=x", "readonly=, serial="),
        ("werror=stop", "werror="),
        ("lun=0", "lun="),
        ("target=1,fault=error@0", "fault=, target="),
    ],
)
def test_options_of_a_disk_need_a_disk(options: str, named: str) -> None:
    with pytest.raises(UsageError, match=f": {named} without a disk: .*add image="):
        registry.create(f"scsi,queues=2,{options}")
    assert made(["scsi,controller=c,queues=2,transfer=64,version=6.0"]).units == {}


def test_a_place_that_is_taken_costs_only_the_newcomer() -> None:
    device = made(["scsi,format=memory,size=1M"])
    with pytest.raises(UsageError, match="taken"):
        device.join(registry.create("scsi,format=memory,size=1M,lun=0"))
    assert places(device) == {(0, 0): ("scsi-0-0", "None")}


def test_an_option_of_the_controller_holds_for_all_of_its_lines() -> None:
    first, second = registry.create_all(
        [
            "scsi,format=null",
            "scsi,format=null,controller=other,queues=3",
            "scsi,format=null,queues=0x2,transfer=64",
            "scsi,format=null,controller=other",
            "scsi,format=null,queues=2,version=5.1",
        ]
    )
    assert isinstance(first, Scsi)
    assert isinstance(second, Scsi)
    assert (first.queues, first.max_transfer, str(first.max_version)) == (2, 64 << 10, "5.1")
    assert (second.queues, second.max_transfer, str(second.max_version)) == (3, 256 << 10, "6.2")
    assert sorted(first.units) == [(0, 0), (0, 1), (0, 2)]
    # Made again from their lines, and from one line alone, they are the same.
    for lines in (first.lines(), [first.lines()[1]]):
        again = made(lines)
        assert (again.queues, again.max_transfer, str(again.max_version)) == (2, 64 << 10, "5.1")


def test_a_disk_that_comes_later_is_of_the_controller_that_is_there() -> None:
    device = made(["scsi,format=null,transfer=64"])
    [line] = registry.completed(["scsi,format=null"], device.lines())
    assert device.join(registry.create(line))
    with pytest.raises(UsageError, match="transfer=32, but controller scsi has transfer=64"):
        registry.completed(["scsi,format=null,transfer=32"], device.lines())
    # What no line says has its default value, and another cannot be had any more.
    [line] = registry.completed(["scsi,format=null,queues=2"], device.lines())
    with pytest.raises(
        UsageError, match="controller scsi has queues=8, not 2; this option applies to the whole controller"
    ):
        device.join(registry.create(line))


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("queues", "2", "3"),
        ("transfer", "64", "128"),
        ("version", "5.1", "6.2"),
        ("instance", "11111111-2222-4333-8444-555555555555", "11111111-2222-4333-8444-555555555556"),
    ],
)
def test_two_lines_that_contradict_each_other_are_refused(key: str, one: str, other: str) -> None:
    lines = [f"scsi,format=null,{key}={one}", "scsi,format=null", f"scsi,format=null,{key}={other}"]
    with pytest.raises(
        UsageError, match=f"{key}={other}, but controller scsi has {key}={one}; it holds for all"
    ):
        registry.create_all(lines)
    same = registry.create_all([*lines[:2], lines[0]])
    assert len(same) == 1
