"""The façades are what docs/api.md says, name for name, and what they export is all that devices need."""

from __future__ import annotations

import ast
import re
import types
from pathlib import Path

import pytest
import vmbus.api
import vmbus.testing

ROOT = Path(__file__).parents[2]
FACADES = [vmbus.api, vmbus.testing]


def documented(module: str) -> list[str]:
    """The names in the first column of the tables under the heading of ``module`` in docs/api.md."""
    text = (ROOT / "docs" / "api.md").read_text()
    section = re.search(rf"^## `{re.escape(module)}`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section is not None, f"docs/api.md has no section {module}"
    return re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)


@pytest.mark.parametrize("facade", FACADES, ids=lambda facade: facade.__name__)
def test_every_public_name_is_documented_and_nothing_else(facade: types.ModuleType) -> None:
    names = documented(facade.__name__)
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(facade.__all__)


@pytest.mark.parametrize(
    ("facade", "name"),
    [
        (vmbus.api, "Channel"),
        (vmbus.api, "DeviceEnvironment"),
        (vmbus.testing, "LoopbackGuest"),
        (vmbus.testing, "FakeChannel"),
    ],
)
def test_documented_members_exist(facade: types.ModuleType, name: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    row = re.search(rf"^\| `{name}` \| (.*) \|$", text, re.MULTILINE)
    assert row is not None
    members = set(re.findall(r"`(\w+)`", row[1])) - {"io"} - set(facade.__all__)
    assert members
    assert [member for member in sorted(members) if not hasattr(getattr(facade, name), member)] == []


@pytest.mark.parametrize("facade", FACADES, ids=lambda facade: facade.__name__)
def test_all_is_what_is_imported(facade: types.ModuleType) -> None:
    tree = ast.parse(Path(str(facade.__file__)).read_text())
    imported = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    ]
    assert sorted(imported) == sorted(facade.__all__)
    assert all(hasattr(facade, name) for name in facade.__all__)


@pytest.mark.parametrize("facade", FACADES, ids=lambda facade: facade.__name__)
def test_everything_public_has_a_docstring(facade: types.ModuleType) -> None:
    bare = [
        name
        for name in facade.__all__
        if isinstance(getattr(facade, name), type | types.FunctionType) and not getattr(facade, name).__doc__
    ]
    assert bare == []


def test_the_tutorial_and_the_example_import_only_facades() -> None:
    text = (ROOT / "docs" / "devices.md").read_text()
    sources = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    sources += [path.read_text() for path in (ROOT / "examples").rglob("*.py")]
    modules = {
        node.module
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vmbus"
    }
    assert modules == {facade.__name__ for facade in FACADES}
