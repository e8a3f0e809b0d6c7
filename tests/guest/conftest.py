"""Programs for guests, compiled once a session."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="session")
def guest_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles ``programs/NAME.c`` into a static program."""
    folder = tmp_path_factory.mktemp("programs")

    def compile_program(name: str) -> Path:
        target = folder / name
        if not target.exists():
            subprocess.run(
                ["cc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, PROGRAMS / f"{name}.c"],
                check=True,
            )
        return target

    return compile_program
