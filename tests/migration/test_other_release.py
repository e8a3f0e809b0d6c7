"""A guest goes on from one release to another and back: its state, where nothing new is in use, is read by both.

The other release is a commit of this repository; a checkout without its history cannot show this.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.waiting import until
from tests.migration.test_commands import emulators
from tests.migration.test_reload import WRITE_AND_READ, make_qcow2

pytestmark = pytest.mark.guest

OTHER = "9b63cdab39d325a1e9a10d435aa2107f22ab1ecb"
"""A commit from before `vmbus run --supervise`."""
ROOT = Path(__file__).parent.parent.parent


def program(folder: Path) -> Path:
    """Return the other release's ``vmbus``."""
    archive, source = folder / "source.tar", folder / "source"
    done = subprocess.run(
        ["git", "-C", ROOT, "archive", "-o", archive, OTHER, "emulator", "device"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"the history of this checkout does not have {OTHER}: {done.stderr.strip()}")
    with tarfile.open(archive) as file:
        file.extractall(source, filter="data")
    path = folder / "programs" / "vmbus"
    path.parent.mkdir()
    paths = f"{source / 'emulator'}:{source / 'device'}"
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(paths)} exec {shlex.quote(sys.executable)} -m vmbus "$@"\n'
    )
    path.chmod(0o700)
    return path


async def test_a_guest_goes_to_another_release_and_back(tmp_path: Path) -> None:
    other = program(tmp_path)
    image, qcow2 = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    image.write_bytes(bytes(64 << 20))
    make_qcow2(qcow2, "64M")
    disks = ("--device", f"scsi,image={image}", "--device", f"scsi,image={qcow2},format=qcow2")
    words = ("--fast-boot", "--memory", "256M", "--device", "heartbeat,interval=0.05", *disks)
    async with emulators() as started:
        guest = Emulator.start(tmp_path, "run", "--name", "a", *words, "--", "sh", "-c", WRITE_AND_READ)
        started.append(guest)

        async def works() -> None:
            done = guest.output.count("round-")
            await until(lambda: guest.output.count("round-") >= done + 2, "two rounds", guest, timeout=LIMIT)
            await guest.more_beats("a")

        await works()
        await asked(tmp_path, "reload", "a", "--emulator", str(other))
        assert "takeovers" not in await guest.status("a")  # which this release has
        await works()
        await asked(tmp_path, "reload", "a", "--emulator", str(Path(sys.executable).parent / "vmbus"))
        assert "takeovers" in await guest.status("a")
        await works()
        await asked(tmp_path, "device", "add", "a", "echo")
        status, errors = await guest.ended()
        assert status == 5, errors
        assert "bad-" not in guest.output
