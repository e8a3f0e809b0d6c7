"""``vmbus channel``: channels of a guest under load are saved and restored one by one, and nothing is lost."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from vmbus.cli import main

from tests.guest.harness import LOADED_MODULES, boot
from tests.guest.test_boot import complaints

pytestmark = pytest.mark.guest

MIB = 1 << 20
ROUNDS = 3
LOAD = (
    "(while dd if=/dev/sda bs=64k iflag=direct 2>/dev/null | md5sum | grep -q SUM; do echo read; done; "
    "echo disk-failed) & "
    "while echo_client --count 400 --generate 400 --fill 10; do :; done; echo echo-failed"
)


async def test_channels_of_a_loaded_guest_are_saved_and_restored_by_hand(
    tmp_path: Path, guest_program: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    image, chunks = tmp_path / "disk.img", tmp_path / "saved.chunks"
    content = bytes(range(256)) * (2 * MIB // 256)
    image.write_bytes(content)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    async with boot(
        tmp_path,
        smp=2,
        memory=256,
        devices=("heartbeat,interval=0.05", "echo", f"scsi,image={image}"),
        load=(*LOADED_MODULES, "uio_hv_generic", "hv_storvsc", "sd_mod"),
        add=[(guest_program("echo_client"), "/bin/echo_client")],
        command=[LOAD.replace("SUM", digest)],
    ) as guest:

        async def channel(*words: str) -> str:
            capsys.readouterr()
            status = await asyncio.to_thread(main, ["channel", words[0], guest.name, *words[1:]])
            captured = capsys.readouterr()
            assert status == 0, captured.err
            return captured.out

        def done() -> tuple[int, int, int]:
            output = bytes(guest.output)
            beats = int(guest.device("heartbeat").status()["answers"])
            return output.count(b"read\n"), output.count(b"{"), beats

        async def more() -> None:
            before = done()
            await guest.until(
                lambda: all(now > then for now, then in zip(done(), before, strict=True)),
                "more from the disk, the echo client and the heartbeat",
            )

        guest.failure_word = b"-failed"
        await more()
        for number in range(ROUNDS):
            for name in ("echo", "scsi", "heartbeat"):
                assert "STATUS_SUCCESS" in await channel("pause", name)
                size = str(64 << (6 * number))
                calls = json.loads(await channel("save", name, str(chunks), "--buffer", size, "--json"))
                assert calls["calls"][-2]["status"] == "STATUS_SUCCESS"
                assert calls["calls"][-2]["required"] == 0
                assert "STATUS_SUCCESS" in await channel("restore", name, str(chunks), "--buffer", size)
                await channel("start", name)
            await more()
        found = guest.status()
        assert all(each["refusals"] == {} for each in found["channels"])
        assert all(each["io"]["refusals"] == {} for each in found["channels"])
        assert {each["device"]: each["opens"] for each in found["channels"] if each["device"] != "echo"} == {
            "heartbeat": 1,
            "scsi": 1,
        }
        assert b"failed" not in guest.output
        assert complaints(guest.console()) == []
