"""The lock of a source keeps no descriptor, whatever QEMU refuses and however its host ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from vmbus.errors import QemuError
from vmbus.machine.migration.fence import SourceFence
from vmbus.machine.migration.ports import Monitor


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
