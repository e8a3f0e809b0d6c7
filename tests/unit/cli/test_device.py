"""``vmbus device`` and ``vmbus shutdown`` work for any device that has the hooks, not only for the built-in ones."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import pytest
from vmbus.api import (
    Channel,
    ControlCommand,
    Device,
    HasParts,
    Help,
    InternalError,
    Offer,
    Packet,
    Part,
    Registry,
    UsageError,
    UserError,
)
from vmbus.cli import device as verb
from vmbus.cli import shutdown
from vmbus.devices.options import parse_size
from vmbus.errors import MissingRequirement
from vmbus.machine import removal
from vmbus.machine.control import ask
from vmbus.machine.host import AttachedDevice, Host
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.served import Served
from vmbus.testing import LoopbackGuest
from vmbus_devices.scsi.controller import Controller

MIB = 1 << 20


class Shelf(Device):
    """A third party's device: named boxes of a size, one --device line each."""

    name = "shelf"

    def __init__(self, *, box: Annotated[str | None, Help("name of a box")] = None) -> None:
        self.boxes = {} if box is None else {box: 8}
        self.asked: list[Mapping[str, Any]] = []
        self.outstanding = 0

    def offer(self) -> Offer:
        return Offer(interface_id=uuid.UUID(int=1), instance_id=uuid.UUID(int=2), name=self.name)

    def packet(self, io: Channel, packet: Packet) -> None:
        io.answer(packet)

    def join(self, other: Device) -> bool:
        if not isinstance(other, Shelf):
            return False
        self.boxes |= other.boxes
        return True

    def parts(self) -> Mapping[str, Part]:
        return {
            name: Part("box", f"shelf,box={name}", size, {"full": False}) for name, size in self.boxes.items()
        }

    def part_name(self, text: str) -> str | None:
        return text.lower() if text.lower() in self.boxes else None

    def detach_part(self, name: str) -> None:
        del self.boxes[name]

    async def resize_part(self, name: str, size: int | None) -> None:
        if size == 13:
            raise UserError("13 is not possible; choose another size")
        self.boxes[name] = size or 16

    def busy(self) -> bool:
        self.outstanding -= 1
        return self.outstanding >= 0

    def control_commands(self) -> Mapping[str, ControlCommand]:
        return {"shutdown": self._shut_down, "count": self._count}

    async def _count(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"boxes": len(self.boxes)}

    async def _shut_down(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        return {"result": "done", "agreed": True}


class Plain(Device):
    """A device without any hook."""

    name = "plain"

    def offer(self) -> Offer:
        return Offer(interface_id=uuid.UUID(int=3), instance_id=uuid.UUID(int=4), name=self.name)

    def packet(self, io: Channel, packet: Packet) -> None:
        io.answer(packet)


@dataclass
class FakeHost:
    """What the verbs need of a host."""

    devices: list[AttachedDevice] = field(default_factory=list)
    stopped: bool = False
    bus: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(channels=[], messages_waiting=0))
    migration: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(phase=Phase.IDLE, command=""))

    def check_device(self, device: Device) -> None: ...

    def add_device(self, device: Device) -> AttachedDevice:
        io = LoopbackGuest(device).io
        offered = SimpleNamespace(state=SimpleNamespace(name="OFFERED"), offer=device.offer(), is_open=True)
        attached = AttachedDevice(device, io, cast("Any", offered))
        self.devices.append(attached)
        return attached

    def remove_device(self, attached: AttachedDevice) -> None:
        self.devices.remove(attached)

    async def ask(self, action: str, **request: object) -> dict[str, Any]:
        answer = verb.answer(cast("Host", self), {"action": action, **request})
        return cast("dict[str, Any]", await cast("Any", answer))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    entries = [EntryPoint(name, f"{__name__}:{cls}", "vmbus.devices") for name, cls in (("shelf", "Shelf"),)]
    entries.append(EntryPoint("plain", f"{__name__}:Plain", "vmbus.devices"))
    monkeypatch.setattr(EntryPoint, "load", lambda entry: globals()[entry.value.partition(":")[2]])
    monkeypatch.setattr(verb, "registry", lambda: Registry(entries))
    return FakeHost()


async def names(host: FakeHost) -> list[str]:
    return [each["name"] for each in (await host.ask("list"))["devices"]]


async def test_devices_and_parts_are_listed(host: FakeHost) -> None:
    assert await host.ask("add", line="shelf,box=one") == {"name": "shelf", "done": "shelf is offered"}
    assert await host.ask("add", line="plain") == {"name": "plain", "done": "plain is offered"}
    shelf, plain = (await host.ask("list"))["devices"]
    assert shelf == {
        "name": "shelf",
        "state": "offered",
        "instance": str(uuid.UUID(int=2)),
        "line": "shelf,box=one",
        "disks": [{"name": "shelf/one", "line": "shelf,box=one", "full": False, "type": "box"}],
    }
    assert plain["disks"] == []
    assert verb.render([shelf, plain]).splitlines()[1:] == [
        "shelf      offered",
        "shelf/one  box      shelf,box=one",
        "plain      offered  plain",
    ]


async def test_a_line_that_is_a_part_joins_its_device(host: FakeHost) -> None:
    await host.ask("add", line="shelf,box=one")
    assert await host.ask("add", line="shelf,box=two") == {"name": "shelf/two", "done": "shelf/two is there"}
    assert await names(host) == ["shelf"]


async def test_a_second_device_of_a_name_is_refused(host: FakeHost) -> None:
    await host.ask("add", line="plain")
    with pytest.raises(UserError, match="give this one a name"):
        await host.ask("add", line="plain")
    await host.ask("add", line="plain,id=other")
    assert await names(host) == ["plain", "other"]


async def test_a_part_is_removed_by_its_name_however_it_is_written(host: FakeHost) -> None:
    await host.ask("add", line="shelf,box=one")
    await host.ask("add", line="shelf,box=two")
    assert (await host.ask("remove", device="shelf/ONE"))["done"] == "shelf/ONE is removed"
    assert [part["name"] for part in (await host.ask("list"))["devices"][0]["disks"]] == ["shelf/two"]


async def test_a_device_loses_its_parts_first_and_goes_when_it_is_not_busy(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "QUIET_PERIOD", 0.001)
    await host.ask("add", line="shelf,box=one")
    shelf = cast("Shelf", host.devices[0].device)
    shelf.outstanding = 3
    await host.ask("remove", device="shelf")
    assert (shelf.boxes, host.devices) == ({}, [])
    assert shelf.outstanding < 0


async def test_a_device_that_stays_busy_stays_unless_it_is_forced(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "FINISH_TIMEOUT", 0.01)
    await host.ask("add", line="shelf,box=one")
    cast("Shelf", host.devices[0].device).outstanding = 1 << 30
    with pytest.raises(UserError, match="shelf is without its disks, but it is still offered"):
        await host.ask("remove", device="shelf")
    assert await names(host) == ["shelf"]
    await host.ask("remove", device="shelf", force=True)
    assert await names(host) == []


async def test_a_device_stays_while_a_migration_begins(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "QUIET_PERIOD", 0.05)
    await host.ask("add", line="shelf,box=one")
    removing = asyncio.ensure_future(host.ask("remove", device="shelf"))
    await asyncio.sleep(0)
    host.migration.phase = Phase.MIGRATING
    with pytest.raises(
        UserError, match="still offered: devices cannot be changed while the guest is migrating"
    ):
        await removing
    assert await names(host) == ["shelf"]


async def test_a_device_that_gets_a_part_while_it_is_removed_stays(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "QUIET_PERIOD", 0.05)
    await host.ask("add", line="shelf,box=one")
    removing = asyncio.ensure_future(host.ask("remove", device="shelf"))
    await asyncio.sleep(0)
    await host.ask("add", line="shelf,box=two")
    with pytest.raises(UserError, match="shelf stays: two was added"):
        await removing


async def test_a_channel_that_the_guest_keeps_is_reported(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "RELEASE_TIMEOUT", 0.01)
    await host.ask("add", line="plain")
    host.bus.channels = [host.devices[0].channel]
    answer = await host.ask("remove", device="plain")
    assert answer["released"] is False
    assert "the guest has not released its channel yet" in answer["done"]
    await host.ask("add", line="plain")
    host.bus.channels = []
    assert await host.ask("remove", device="plain") == {
        "name": "plain",
        "released": True,
        "done": "plain is removed",
    }


async def test_a_part_is_resized(host: FakeHost) -> None:
    await host.ask("add", line="shelf,box=one")
    assert await host.ask("resize", device="shelf/one", size=32) == {
        "name": "shelf/one",
        "size": 32,
        "done": "shelf/one has 32 bytes",
    }
    assert (await host.ask("resize", device="shelf/one", size=32))[
        "done"
    ] == "shelf/one has 32 bytes, as before"
    assert (await host.ask("resize", device="shelf/one"))["size"] == 16


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"action": "resize", "device": "shelf/one", "size": 13}, "choose another size"),
        ({"action": "resize", "device": "shelf"}, "name one of them, as in shelf/one"),
        ({"action": "resize", "device": "plain"}, "is not a disk, so it has no size"),
        ({"action": "remove", "device": "shelf/two"}, "there are shelf, plain, shelf/one"),
        ({"action": "remove", "device": "plain/0:0"}, "there is no device plain/0:0"),
        ({"action": "grow"}, "unknown action 'grow'"),
    ],
)
async def test_what_cannot_be_done_is_explained(host: FakeHost, request_: dict[str, Any], told: str) -> None:
    await host.ask("add", line="shelf,box=one")
    await host.ask("add", line="plain")
    with pytest.raises(UserError, match=told):
        await host.ask(request_.pop("action"), **request_)


@pytest.mark.parametrize(
    "error", [None, MissingRequirement("no compiler"), InternalError("it does not compile")]
)
async def test_libraries_are_compiled_before_an_added_device_starts(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    calls: list[str] = []

    def build() -> None:
        calls.append(
            "build" if threading.current_thread() is not threading.main_thread() else "blocked the loop"
        )
        if error is not None:
            raise error

    monkeypatch.setattr(Plain, "native_libraries", (SimpleNamespace(build=build),))
    monkeypatch.setattr(Plain, "start", lambda self, environment: calls.append("start"))
    await host.ask("add", line="plain")
    assert calls == ["build", "start"]


async def test_devices_stay_as_they_are_while_the_guest_moves(host: FakeHost) -> None:
    host.migration.phase = Phase.MIGRATING
    assert await host.ask("list") == {"devices": []}
    with pytest.raises(UserError, match="while the guest is migrating; try again"):
        await host.ask("add", line="plain")


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("4k", 4096), ("20G", 20 << 30), ("1T", 1 << 40)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "G", "20GB", "-1", "1.5G"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="as in 20G"):
        parse_size(text)


async def shut_down(host: FakeHost, request: Mapping[str, Any]) -> object:
    answer: Any = shutdown.answer(cast("Host", host), request)
    return await answer


async def test_shutdown_goes_to_the_device_that_has_the_command(host: FakeHost) -> None:
    for line in ("plain", "shelf"):
        await host.ask("add", line=line)
    assert await shut_down(host, {"action": "restart", "force": True}) == {"result": "done", "agreed": True}
    assert cast("Shelf", host.devices[1].device).asked == [{"action": "restart", "force": True}]


async def test_shutdown_without_such_a_device_says_which_to_add(host: FakeHost) -> None:
    await host.ask("add", line="plain")
    with pytest.raises(UserError, match="--device shutdown"):
        await shut_down(host, {})


async def test_the_control_socket_answers_the_commands_of_devices(host: FakeHost, tmp_path: Path) -> None:
    await host.ask("add", line="shelf,box=one")
    served = Served(cast("Host", host), tmp_path, shutdown.CONTROL_COMMANDS)
    await served.start()
    try:
        for command, found in (("count", {"boxes": 1}), ("shutdown", {"result": "done", "agreed": True})):
            assert await asyncio.to_thread(ask, tmp_path / "control.sock", command) == found
        with pytest.raises(UserError, match="known: count, reload, shutdown, status, stop"):
            await asyncio.to_thread(ask, tmp_path / "control.sock", "other")
    finally:
        await served.stop_listening()


async def test_the_scsi_controller_has_the_hooks() -> None:
    controller = Registry().create("scsi,format=memory,size=1M,lun=1")
    assert isinstance(controller, HasParts)
    assert list(controller.parts()) == ["0:1"]
    part = controller.parts()["0:1"]
    assert (part.type, part.size) == ("disk", MIB)
    assert "lun=1" in part.line
    assert [controller.part_name(text) for text in ("0:1", "1", "0", "1:1", "x", "")] == [
        "0:1",
        "0:1",
        *[None] * 4,
    ]
    assert not controller.busy()
    for size, told in ((MIB - 512, "made smaller"), (MIB + 1, "block")):
        with pytest.raises(UserError, match=told):
            await controller.resize_part("0:1", size)
    controller.detach_part("0:1")
    assert controller.parts() == {}


async def test_a_disk_that_replaced_the_resized_one_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Registry().create("scsi,format=memory,size=1M")
    assert isinstance(controller, Controller)
    [unit] = controller.units.values()

    def grow(size: int) -> None:
        controller.detach_part("0:0")
        other = Registry().create("scsi,format=memory,size=4M")
        assert isinstance(other, Controller)
        controller.units[0, 0] = other.units[0, 0]

    monkeypatch.setattr(unit.backend, "grow", grow)
    with pytest.raises(UserError, match="0:0 was removed while it was resized"):
        await controller.resize_part("0:0", 2 * MIB)
