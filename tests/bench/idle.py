"""What the emulator costs while its guest does nothing: ``vmbus run`` as users have it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.linux import KERNEL
from tests.bench.report import Result

SECONDS = 8.0
LIMIT = 120.0
_MIB = 1 << 20
_ROOT = Path(__file__).parents[2]


def run() -> Result:
    """See above."""
    result = Result("The emulator beside an idle guest (heartbeat, shutdown, timesync; vmbus run)")
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-") as folder:
        environment = {**os.environ, "XDG_RUNTIME_DIR": folder}
        vmbus = [sys.executable, "-m", "vmbus"]
        run = [*vmbus, "run", "--name", "idle", "--guest", KERNEL]
        emulator = subprocess.Popen(run, env=environment, cwd=_ROOT)
        try:

            def status() -> dict[str, Any]:
                answer = subprocess.run(
                    [*vmbus, "status", "idle", "--json"],
                    env=environment,
                    cwd=_ROOT,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                return json.loads(answer.stdout) if answer.returncode == 0 else {}

            _wait_until_beating(emulator, status)
            time.sleep(2.0)  # the guest goes on with its own start for a moment
            before = status()
            time.sleep(SECONDS)
            after = status()
            memory = _kinds_of_memory(emulator.pid)
        finally:
            emulator.terminate()
            emulator.wait()
    asked, spent = (_spent(after, before, key) for key in ("uptime", "cpu_seconds"))
    result.figure("CPU, of one core", 100 * spent / asked, "%", "< 0.5")
    result.figure("resident memory", after["emulator"]["memory"] / _MIB, "MiB", "< 60")
    for kind, size in memory.items():
        result.figure(f"of it {kind}", size / _MIB, "MiB")
    result.figure("peak memory", after["emulator"]["peak_memory"] / _MIB, "MiB")
    for name in ("traps", "doorbells", "interrupts"):
        result.figure(f"{name} a second", (after[name] - before[name]) / asked)
    return result


def _kinds_of_memory(pid: int) -> dict[str, int]:
    """Resident bytes of a process: its own, and pages of files (programs, libraries, guest RAM)."""
    found = {"private": 0, "programs, libraries, guest RAM": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        if name == "Rss:":
            found["programs, libraries, guest RAM"] += int(size) << 10
        elif name == "Anonymous:":
            found["private"] += int(size) << 10
            found["programs, libraries, guest RAM"] -= int(size) << 10
    return found


def _spent(after: dict[str, Any], before: dict[str, Any], key: str) -> float:
    return float(after["emulator"][key]) - float(before["emulator"][key])


def _wait_until_beating(emulator: subprocess.Popen[bytes], status: Any) -> None:
    end = time.monotonic() + LIMIT
    while True:
        channels = status().get("channels", [])
        if any(channel["details"].get("answers", 0) >= 2 for channel in channels if "details" in channel):
            return
        if time.monotonic() > end or emulator.poll() is not None:
            raise TimeoutError(f"no heartbeat within {LIMIT:g} s")
        time.sleep(0.5)
