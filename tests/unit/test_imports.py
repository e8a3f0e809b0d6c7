"""Imports point one way, and nobody imports a name that another module keeps for itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUND = {"durable", "errors", "native", "native_layout", "ports", "private", "refusals", "wire"}
STATE_MACHINES = GROUND | {"hypervisor", "bus", "saving"}
MAY_IMPORT = {
    "wire": {"errors"},
    "provision": {"durable", "errors", "printable", "private"},
    "hypervisor": GROUND,
    "bus": GROUND,
    "saving": GROUND | {"bus", "version"},
    "devices": GROUND | {"bus"},
    "vmbus_devices": GROUND | {"api", "bus", "devices"},
    "sandbox": set(),
    "machine": STATE_MACHINES | {"provision", "sandbox", "version"},
}
"""A part of the house → the others that it knows. Only ``cli`` and the test doubles know more."""


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every ``import`` and ``from ... import`` in ``path``, of this project's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from (
            pair for pair in found if pair[0].partition(".")[0] in ("vmbus", "vmbus_devices", "tests")
        )


def part_of(module: str, name: str) -> str:
    top, *rest = module.split(".")
    if top != "vmbus":
        return top
    if rest:
        return rest[0]
    return name if name and name != "__version__" else "version"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    folder = ROOT / "device" / part if part == "vmbus_devices" else ROOT / "emulator" / "vmbus" / part
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in folder.rglob("*.py")
        for module, name in imported(path)
        if part_of(module, name) not in MAY_IMPORT[part] | {part}
    ]
    assert not wrong


def test_the_emulator_imports_no_device() -> None:
    """The command line finds the built-in devices as it finds a third party's: by their entry points."""
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in (ROOT / "emulator" / "vmbus").rglob("*.py")
        for module, name in imported(path)
        if part_of(module, name) == "vmbus_devices"
    ]
    assert not wrong


def test_private_names_stay_in_their_module() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for folder in ("emulator", "device", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for module, name in imported(path)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not wrong
