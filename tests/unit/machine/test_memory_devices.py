"""RAM that is plugged while a guest runs is named, as long as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from vmbus.errors import QemuError
from vmbus.machine.host import Host
from vmbus.machine.once import Once
from vmbus.machine.problems import Problems

DIMM = {"type": "dimm", "data": {"id": "d1", "addr": 1 << 32, "size": 64 << 20, "memdev": "/objects/m"}}
MEM = {"type": "virtio-mem", "data": {"id": "vm0", "memaddr": 1 << 33, "size": 0, "max-size": 1 << 30}}


class PluggingQmp:
    """Each event is preceded by a change of the devices."""

    def __init__(self, *steps: tuple[str, list[dict[str, Any]] | QemuError]) -> None:
        self.steps = steps
        self.devices: list[dict[str, Any]] | QemuError = []
        self.turn: list[asyncio.Task[Any]] = []

    async def execute(self, command: str) -> object:
        assert command == "query-memory-devices"
        if isinstance(self.devices, QemuError):
            raise self.devices
        return self.devices

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for name, devices in self.steps:
            self.devices = devices
            yield name, {"info": {"slot-type": "DIMM"}}
            await asyncio.gather(*self.turn)


async def follow(*steps: tuple[str, list[dict[str, Any]] | QemuError]) -> Host:
    qmp = PluggingQmp(*steps)
    host = Host.__new__(Host)
    host.qmp = qmp  # type: ignore[assignment]
    host.problems = Problems()
    host.migration = SimpleNamespace(event=lambda *_: None)  # type: ignore[assignment]

    def background(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        qmp.turn.append(asyncio.ensure_future(work))
        return qmp.turn[-1]

    host.background = background  # type: ignore[method-assign]
    host._other_ram = Once(background, host._look_for_other_ram, again=True)
    host._ended_by_itself = lambda error: None  # type: ignore[method-assign]
    await host._follow_life()
    return host


async def test_a_dimm_that_is_plugged_is_named_with_what_to_do() -> None:
    host = await follow(("ACPI_DEVICE_OST", [DIMM]))
    (problem,) = host.problems.sentences
    assert "d1 (dimm, 64 MiB at 0x100000000)" in problem and "device_del" in problem


@pytest.mark.parametrize("after", ["DEVICE_DELETED", "ACPI_DEVICE_OST"])
async def test_it_is_forgotten_when_it_is_gone(after: str) -> None:
    host = await follow(("ACPI_DEVICE_OST", [DIMM]), (after, []))
    assert host.problems.sentences == []


async def test_a_memory_device_without_memory_yet_is_no_problem_until_it_grows() -> None:
    assert (await follow(("DEVICE_DELETED", [MEM]))).problems.sentences == []
    grown = {"type": "virtio-mem", "data": {**MEM["data"], "size": 16 << 20}}  # type: ignore[dict-item]
    (problem,) = (await follow(("MEMORY_DEVICE_SIZE_CHANGE", [grown]))).problems.sentences
    assert "vm0 (virtio-mem, 16 MiB at 0x200000000)" in problem


async def test_a_refused_query_does_not_end_the_host(caplog: pytest.LogCaptureFixture) -> None:
    host = await follow(("ACPI_DEVICE_OST", QemuError("no")))
    assert host.problems.sentences == []
    assert "memory devices" in caplog.text


async def test_a_guest_that_reports_in_a_loop_makes_one_task_at_a_time() -> None:
    """A guest can write the firmware's report of a DIMM as often as it likes."""
    host = Host.__new__(Host)
    host._loop = asyncio.get_running_loop()
    host._ended = host._loop.create_future()
    host._tasks = set()
    host.problems = Problems()
    host.migration = SimpleNamespace(event=lambda *_: None)  # type: ignore[assignment]
    host._ended_by_itself = lambda error: None  # type: ignore[method-assign]
    host._other_ram = Once(host.background, host._look_for_other_ram, again=True)
    answers: list[list[dict[str, Any]]] = [[], [DIMM]]
    gate = asyncio.Event()

    async def execute(command: str, arguments: Any = None) -> Any:
        await gate.wait()
        return answers.pop(0)

    async def events() -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for _ in range(100):
            yield "ACPI_DEVICE_OST", {}
            await asyncio.sleep(0)

    host.qmp = SimpleNamespace(execute=execute, events=events)  # type: ignore[assignment]
    await host._follow_life()
    assert len(host._tasks) == 1
    gate.set()
    await asyncio.gather(*host._tasks)
    assert len(host.problems.sentences) == 1, "it is looked once more after the last report"
    assert answers == []
