"""docs/devices.md shows the package examples/adder as it is, and the package's own tests pass."""

from __future__ import annotations

import importlib.util
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vmbus.api import Channel, Device, Registry, options_of
from vmbus.wire import echo

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "devices.md"
ADDER = ROOT / "examples" / "adder"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


def without_blank_lines(text: str) -> str:
    """Methods that are shown without their class are formatted as functions, two blank lines apart."""
    return "".join(line for line in text.splitlines(keepends=True) if line.strip())


@pytest.fixture
def adder_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ADDER / "src")
    spec = importlib.util.spec_from_file_location("adder_tests", ADDER / "tests" / "test_adder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize("block", range(7))
def test_what_the_tutorial_shows_is_in_the_package(block: int) -> None:
    shown = blocks("python")
    assert len(shown) == 7
    files = [without_blank_lines(path.read_text()) for path in ADDER.rglob("*.py")]
    text = without_blank_lines(shown[block])
    assert any(form in file for form in (text, textwrap.indent(text, "    ")) for file in files), shown[block]


def test_members_that_the_tutorial_names_exist() -> None:
    prose = re.sub(r"^```.*?^```", "", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    of_channels = set(re.findall(r"`io\.(\w+)", prose)) - {"channel"}
    hooks = set(re.findall(r"`([a-z]\w+)\(io\b", prose))
    assert of_channels >= {"answer", "complete", "send"}
    assert hooks >= {"opened", "refused", "restored"}
    assert [name for name in of_channels if not hasattr(Channel, name)] == []
    assert [name for name in hooks if not hasattr(Device, name)] == []


def test_the_entry_point_of_the_tutorial_is_that_of_the_package() -> None:
    [shown] = blocks("toml")
    declared = tomllib.loads((ADDER / "pyproject.toml").read_text())
    assert tomllib.loads(shown)["project"]["entry-points"] == declared["project"]["entry-points"]


def every_case(module: ModuleType) -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    for name, test in vars(module).items():
        if name.startswith("test_"):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in marks[0].args[1] if marks else [()]:
                yield test, values


def test_the_tests_of_the_package_pass(adder_tests: ModuleType) -> None:
    cases = list(every_case(adder_tests))
    assert len(cases) >= 6
    for test, values in cases:
        test(*values)


def test_the_registry_makes_one_from_its_line(adder_tests: ModuleType) -> None:
    entries = tomllib.loads((ADDER / "pyproject.toml").read_text())["project"]["entry-points"][
        "vmbus.devices"
    ]
    registry = Registry([EntryPoint(name, value, "vmbus.devices") for name, value in entries.items()])
    device = registry.create("adder,start=7,id=mine")
    assert (device.name, device.status()) == ("mine", {"sum": 7})


def test_guids_and_options_in_the_table_are_the_real_ones() -> None:
    text = DOCUMENT.read_text()
    assert str(echo.ECHO_INTERFACE) in text
    assert str(echo.ECHO_INSTANCE) in text
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = pyproject["project"]["entry-points"]["vmbus.devices"]
    registry = Registry([EntryPoint(name, value, "vmbus.devices") for name, value in declared.items()])
    for name in registry.names:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert set(re.findall(r"`(\w+)=", row)) == {option.key for option in options_of(registry.load(name))}
