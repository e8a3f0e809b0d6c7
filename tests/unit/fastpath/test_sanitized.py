"""The fast path's C under the address and undefined-behaviour sanitizers, fed with packets that are nearly right."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from vmbus import native
from vmbus.errors import MissingRequirement
from vmbus.native_layout import DEVICE_HEADER
from vmbus_devices.scsi.fast.build import SOURCE, layout

HERE = Path(__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fastpath")
    (folder / "layout.h").write_text(layout())
    (folder / "engine_device.h").write_text(DEVICE_HEADER)
    try:
        command = native.compiler()
    except MissingRequirement as error:
        pytest.skip(str(error))
    flags = (
        "-std=c11",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{folder}",
        f"-I{SOURCE}",
    )
    sources = [str(path) for path in sorted(SOURCE.glob("*.c"))]
    target = folder / "harness"
    line = [command, *flags, *SANITIZERS, "-o", str(target), str(HERE / "harness.c"), *sources, "-lm"]
    subprocess.run(line, check=True)
    return target


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_packets_that_are_nearly_right_do_no_harm(harness: Path, tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [harness, "30000", str(seed)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["taken"] > 10000
    assert found["answers"] + found["returned"] == found["taken"]
    assert found["answers"] > found["returned"] > 0
    assert found["depth"] == 0
