"""The mirror of a machine's data path: begun for a successor, and left to the next process with the gateway."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
from vmbus.machine.engine.data_path import EngineDataPath
from vmbus.machine.engine.layout import MAGIC, Mirror
from vmbus.machine.io.addresses import address_of
from vmbus.machine.io.engines import NativeEngines
from vmbus.machine.memory import MappedMemory, RamRegion

from tests.unit.fastpath.fast_guest import RAM, Loop, Machine


class Made:
    """A machine's data path, which is started when the test asks for it."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.memory = memoryview(mmap.mmap(-1, ctypes.sizeof(Mirror)))
        self.mirror = Mirror.from_buffer(self.memory)
        ram = MappedMemory(memoryview(mmap.mmap(-1, RAM)), (RamRegion(0, RAM, 0),))
        self.engines = NativeEngines(ram, lambda: self._start(ram))

    def _start(self, ram: MappedMemory) -> EngineDataPath | None:
        machine = self.machine
        return EngineDataPath.start(
            Loop(), ram, machine.gateway, machine.qtest, machine.interrupts, lambda: None, busy_waits=False
        )

    def path(self) -> EngineDataPath:
        found = self.engines.data_path
        if found is None:
            pytest.skip("no compiler, or no io_uring for us")
        assert isinstance(found, EngineDataPath)
        return found


@pytest.fixture
def made() -> Iterator[Made]:
    made = Made()
    yield made
    made.engines.close()
    made.machine.close()


@pytest.mark.parametrize("started_before", [True, False])
def test_a_channel_is_found_by_the_epoch_of_the_mirror(made: Made, started_before: bool) -> None:
    made.mirror.header.epoch = 4
    if started_before:
        assert made.path().link(7) is None
    made.engines.use_mirror(made.memory)
    link = made.path().link(7)
    assert (made.mirror.header.magic, made.mirror.header.epoch) == (MAGIC, 5)
    assert link is not None
    assert (link.epoch, link.channel, link.given) == (5, 7, False)


def test_it_is_another_process_s_with_the_gateway(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made.path()
    made.engines.use_mirror(made.memory)
    switched: list[int] = []
    monkeypatch.setattr(path.engine, "switch_mirror", switched.append)
    made.engines.leave_gateway()
    [private] = switched
    assert private != address_of(made.memory)
    made.engines.return_to_gateway()
    assert switched == [private, address_of(made.memory)]
