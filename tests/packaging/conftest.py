"""The source distribution and the wheel, built once a session, and a fresh environment with the wheel in it.

All of it happens in copies outside of the checkout. pip fetches the build backend and the dependencies from wherever
the machine's pip fetches packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".*_cache", ".git", ".hypothesis", ".venv*", "__pycache__", "*.egg-info", "build", "dist")
BUILD = """
import os, sys
from setuptools import build_meta
os.chdir(sys.argv[1])
getattr(build_meta, "build_" + sys.argv[2])(sys.argv[3])
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment; its programs run outside of the checkout, and without its modules on any path."""

    folder: Path
    outside: Path

    @property
    def site_packages(self) -> Path:
        [found] = self.folder.glob("lib/python3*/site-packages")
        return found

    def run(
        self, *words: object, variables: Mapping[str, str] | None = None, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment; any other exit status than ``status`` fails the test."""
        program, *arguments = map(str, words)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=self.outside,
            env=kept | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, script: str, *arguments: object, variables: Mapping[str, str] | None = None) -> str:
        """Return what a script prints."""
        return self.run("python", "-c", script, *arguments, variables=variables).stdout

    def install(self, *what: object) -> None:
        """Install packages with pip."""
        self.run("python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", *what)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An empty environment; :func:`installed` is the one with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    return Environment(folder, tmp_path_factory.mktemp("outside"))


class Builder:
    """Builds distributions by the backend that pyproject.toml names, without a new environment for each."""

    def __init__(self, environment: Environment, backend: Path, requirements: Sequence[str]) -> None:
        self._environment = environment
        self._variables = {"PYTHONPATH": str(backend)}
        environment.install("--target", backend, *requirements)

    def build(self, source: Path, kind: str, target: Path) -> Path:
        """Return the path of the ``sdist`` or ``wheel`` of the project in ``source``."""
        self._environment.python(BUILD, source, kind, target, variables=self._variables)
        [found] = target.iterdir()
        return found


@pytest.fixture(scope="session")
def builder(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return Builder(environment, tmp_path_factory.mktemp("backend"), needed)


@pytest.fixture(scope="session")
def sdist(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return builder.build(source, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(builder: Builder, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an installer would."""
    folder = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["tar", "-xf", sdist, "-C", folder], check=True)
    [source] = folder.iterdir()
    return builder.build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(environment: Environment, wheel: Path) -> Environment:
    """An environment with nothing but the wheel and what the wheel depends on."""
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def with_adder(
    installed: Environment, builder: Builder, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """The same, with the device of examples/adder."""
    source = tmp_path_factory.mktemp("adder") / "adder"
    shutil.copytree(ROOT / "examples" / "adder", source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    installed.install("--no-index", builder.build(source, "wheel", tmp_path_factory.mktemp("adder-wheel")))
    return installed
