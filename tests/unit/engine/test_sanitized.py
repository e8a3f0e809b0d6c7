"""The engine under sanitizers: its thread and Python's calls race for nothing, and nothing is out of bounds.

The second load has a queue, whose server does its worst.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vmbus.machine.engine.build import LIBRARY
from vmbus.native import compiler

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("sanitizer", "runtime", "options"),
    [
        ("thread", "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0"}),
        ("address,undefined", "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}),
    ],
    ids=["threads", "memory"],
)
def test_the_engine_under_load(tmp_path: Path, sanitizer: str, runtime: str, options: dict[str, str]) -> None:
    command = compiler()
    library = subprocess.run(
        [command, f"-print-file-name={runtime}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip(f"{command} has no {runtime}")
    files = [str(each) for each in LIBRARY.write_sources(tmp_path)]
    flags = [*LIBRARY.flags, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-O1", "-Wno-tsan"]
    for name, sources in (("engine.so", files), ("device.so", [str(Path(__file__).with_name("device.c"))])):
        line = [command, *flags, f"-I{tmp_path}", "-o", str(tmp_path / name), *sources]
        line += ["-fvisibility=default"] if name == "device.so" else []
        subprocess.run(line, check=True)
    for load in ("load", "queue_load"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                f"tests.unit.engine.{load}",
                tmp_path / "engine.so",
                tmp_path / "device.so",
            ],
            cwd=ROOT,
            env={**os.environ, **options, "LD_PRELOAD": library, "PYTHONMALLOC": "malloc"},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        for line_ in done.stdout.splitlines():
            sent, ended = map(int, line_.split())
            assert sent == ended > 0
        assert len(done.stdout.splitlines()) == 2
