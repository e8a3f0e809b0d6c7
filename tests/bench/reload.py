"""How long nobody serves a guest while its emulator is replaced (`vmbus reload`), and how long the command takes.

Each reload is of real processes: a new Python, which imports the emulator and makes the devices while the one before
serves on. What a reload itself reports is measured from the moment in which the process that goes leaves the gateway
to that in which the next one may serve. The guest (Debian 6.12, one vCPU) is idle.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vmbus.errors import InternalError, UserError
from vmbus.machine.control import ask
from vmbus.provision.qemu import find_qemu

from tests.bench.report import Result

RELOADS = 10
_LIMIT = 60.0


def run() -> Result:
    """Measure, and return the figures."""
    result = Result("reload: nobody serves the guest, and the whole command")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, qcow2 = folder / "disk.img", folder / "disk.qcow2"
        raw.write_bytes(bytes(1 << 20))
        create = [*find_qemu().qemu_img(), "create", "-q", "-f", "qcow2", str(qcow2), "64M"]
        subprocess.run(create, check=True)
        _measure(result, folder, "no disk", [])
        _measure(result, folder, "raw disk", ["--device", f"scsi,image={raw}"])
        _measure(result, folder, "qcow2 disk", ["--device", f"scsi,image={qcow2},format=qcow2"])
    return result


def _measure(result: Result, folder: Path, what: str, devices: Sequence[str]) -> None:
    control = folder / "vmbus" / "bench" / "control.sock"
    words = ["run", "--name", "bench", "--fast-boot", "--memory", "256M", *devices]
    process = subprocess.Popen(
        [sys.executable, "-m", "vmbus", *words],
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait(process, lambda: _open_channels(control) >= 3 + bool(devices))
        still, whole = [], []
        for _ in range(RELOADS):
            begun = time.monotonic()
            still.append(ask(control, "reload", answer_timeout=_LIMIT)["still"] * 1e6)
            whole.append((time.monotonic() - begun) * 1e6)
    finally:
        process.terminate()
        process.wait()
    result.add(f"nobody serves the guest, {what}", still, "<= 50 ms")
    result.add(f"the command, {what}", whole)


def _open_channels(control: Path) -> int:
    try:
        found: dict[str, Any] = ask(control, "status")
    except UserError:
        return 0
    return sum(channel["state"] == "open" for channel in found["channels"])


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _LIMIT
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise InternalError("the guest of the benchmark did not come up")
        time.sleep(0.1)
