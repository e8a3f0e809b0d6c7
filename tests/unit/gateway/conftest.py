"""The harness, compiled once with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from vmbus import native
from vmbus.errors import MissingRequirement
from vmbus.machine.engine import build as engine_build
from vmbus.machine.gateway import build as gateway_build

from tests.unit.gateway.gateway_harness import Harness

HERE = Path(__file__).parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def compile_c(target: Path, *files: Path) -> Path:
    """Compile a program together with the gateway's headers; warnings are errors."""
    try:
        command = native.compiler()
    except MissingRequirement as error:
        pytest.skip(str(error))
    folders = (gateway_build.SOURCE, engine_build.SOURCE, HERE)
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread", *[f"-I{folder}" for folder in folders])
    subprocess.run([command, *flags, *SANITIZERS, "-o", target, *files], check=True)
    return target


@pytest.fixture(scope="session")
def harness_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [*HERE.glob("*.c"), *gateway_build.SOURCE.glob("*.c"), engine_build.SOURCE / "signals.c"]
    return compile_c(tmp_path_factory.mktemp("harness") / "harness", *files)


@pytest.fixture
def launch(harness_program: Path, tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    """Starts the harness: ``launch(vcpus=2, arguments=("wait=off",))``."""
    with ExitStack() as stack:

        def launch(**options: object) -> Harness:
            return stack.enter_context(Harness(harness_program, tmp_path, **options))  # type: ignore[arg-type]

        yield launch


@pytest.fixture
def harness(launch: Callable[..., Harness]) -> Harness:
    """One vCPU, ``wait=on``."""
    return launch()
