"""The lock of a source keeps no descriptor, whatever QEMU refuses and however its host ends."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from vmbus.errors import QemuError, UserError
from vmbus.machine.migration.fence import SourceFence
from vmbus.machine.migration.ports import Monitor
from vmbus.machine.migration.state_machine import Phase

from tests.unit.machine.migrating import SHARED
from tests.unit.machine.test_coordinator_memory import Qemu


class Refusing:
    """A QMP connection to a QEMU that refuses ``refused``."""

    def __init__(self, refused: str = "") -> None:
        self.refused = refused

    async def lend(self, descriptors: Sequence[int]) -> int:
        if self.refused == "add-fd":
            raise QemuError("no add-fd")
        return 3

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if command == self.refused:
            raise QemuError(f"no {command}")
        return {}


def open_images() -> int:
    links = (str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
    return sum("vmbus-fence" in link for link in links)


def is_locked() -> bool:
    """Return whether QEMU would be refused the lock for writing."""
    [image] = [each for each in Path("/proc/self/fd").iterdir() if "vmbus-fence" in str(each.resolve())]
    descriptor = os.open(image, os.O_RDWR)
    try:
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 201, 1, 0)
        found = fcntl.fcntl(descriptor, 36, wanted)  # F_OFD_GETLK
    finally:
        os.close(descriptor)
    return bool(struct.unpack("hhqqi4x", found)[0] != fcntl.F_UNLCK)


@pytest.mark.parametrize("refused", ["add-fd", "blockdev-add"])
async def test_a_qemu_that_refuses_the_node_costs_no_descriptor(refused: str) -> None:
    fence = SourceFence(cast("Monitor", Refusing(refused)))
    await fence.prepare()
    assert open_images() == 0
    fence.close()
    fence.open()
    await fence.lift()


async def test_a_host_that_ends_after_its_guest_left_keeps_no_descriptor() -> None:
    fence = SourceFence(cast("Monitor", Refusing()))
    await fence.prepare()
    fence.close()
    assert open_images() == 1
    fence.leave()
    assert open_images() == 0
    fence.leave()


async def test_a_guest_that_is_not_taken_back_is_fenced_again() -> None:
    """QEMU refuses cont as long as the target holds the disks; another program would run the guest in its memory."""
    qemu = Qemu()
    coordinator = qemu.coordinator
    machine = coordinator._machine
    machine.phase, machine.fenced = Phase.LEFT, True
    machine.configuration = SHARED
    qmp = cast("Any", Refusing())
    fence = coordinator._source_fence = SourceFence(cast("Monitor", qmp))
    await fence.prepare()
    fence.close()
    with pytest.raises(UserError, match="QEMU does not resume the guest here"):
        await coordinator.take_back()
    assert (coordinator.fenced, open_images()) == (True, 1)
    assert is_locked()
    await coordinator.close()
    assert open_images() == 0
