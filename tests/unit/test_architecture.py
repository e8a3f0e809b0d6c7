"""The walks in docs/architecture.md name files and functions that exist, in Python and in C."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"

_STEP = re.compile(r"^\d+\. `([^`]+)` `([^`]+)`: ", re.MULTILINE)
_WALK = re.compile(r"^## Walk: (.+)$", re.MULTILINE)
_MIN_STEPS = 8
"""A walk with fewer steps leaves something out."""


def walks(text: str) -> dict[str, list[tuple[str, str]]]:
    """Return the steps of each walk: title → (file, function), in order."""
    titles = list(_WALK.finditer(text))
    ends = [match.start() for match in titles[1:]] + [len(text)]
    return {
        title.group(1): _STEP.findall(text[title.end() : end].split("\n## ", 1)[0])
        for title, end in zip(titles, ends, strict=True)
    }


def python_names(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """Yield ``function``, ``Class`` and ``Class.method`` of a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
            yield from python_names(node, f"{prefix}{node.name}.")


def defines(path: Path, name: str) -> bool:
    """Whether the source file defines the function or method."""
    text = path.read_text()
    if path.suffix == ".py":
        return name in python_names(ast.parse(text))
    return re.search(rf"^\w[\w *]*\b{re.escape(name)}\([^;]*?\)\s*\{{", text, re.MULTILINE) is not None


STEPS = [
    pytest.param(file, name, id=f"{title}-{number}")
    for title, steps in walks(DOCUMENT.read_text()).items()
    for number, (file, name) in enumerate(steps, 1)
]


@pytest.mark.parametrize(("file", "name"), STEPS)
def test_a_step_names_a_function_that_exists(file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"docs/architecture.md names {file}, which does not exist"
    assert defines(path, name), f"docs/architecture.md names {name}, which {file} does not define"


def test_the_walks_are_there_and_whole() -> None:
    found = walks(DOCUMENT.read_text())
    assert [title.split()[1].strip(",") for title in found] == ["GPADL", "SCSI", "SCSI", "migration"]
    assert all(len(steps) >= _MIN_STEPS for steps in found.values())


def test_a_name_that_does_not_exist_is_found() -> None:
    here = Path(__file__)
    assert defines(here, "defines")
    assert not defines(here, "defined")
    c_file = next((ROOT / "emulator").rglob("traps.c"))
    assert not defines(c_file, "memcpy"), "a call is no definition"
