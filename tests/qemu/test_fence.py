"""A real QEMU refuses ``cont`` while its guest is elsewhere, in the memory that is here."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.errors import QemuError
from vmbus.machine.migration.fence import SourceFence

from tests.qemu.test_discovery_qemu import qemu

pytestmark = pytest.mark.qemu


async def test_cont_is_refused_until_the_guest_is_taken_back(tmp_path: Path) -> None:
    socket = tmp_path / "qmp.sock"
    with qemu(tmp_path, ("-machine", "q35", "-qmp", f"unix:{socket},server=on,wait=off")) as process:
        qmp = await process.connect_qmp(socket)
        fence = SourceFence(qmp)
        for _ in range(2):
            await fence.prepare()
            fence.close()
            for _ in range(2):
                with pytest.raises(QemuError, match=r'refused cont.*"write" lock'):
                    await qmp.execute("cont")
                assert not (await qmp.execute("query-status"))["running"]
            fence.open()
            await fence.lift()
            await qmp.execute("cont")
            assert (await qmp.execute("query-status"))["running"]
            await qmp.execute("stop")
            assert await qmp.execute("query-named-block-nodes") == []
            assert await qmp.execute("query-fdsets") == []

        # A migration that fails activates it, with all other images, and the guest runs on.
        await fence.prepare()
        await qmp.execute("cont")
        await fence.lift()
        assert await qmp.execute("query-named-block-nodes") == []
        await qmp.close()
