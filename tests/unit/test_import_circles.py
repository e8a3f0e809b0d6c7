"""No module imports itself through others, not even for types.

A circle under ``TYPE_CHECKING`` costs the interpreter nothing, but the reader much: none of its modules can be
understood or tested without all the others. Where two modules need each other, the lower one declares a protocol.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"vmbus": ROOT / "emulator" / "vmbus", "vmbus_devices": ROOT / "device" / "vmbus_devices"}

KNOWN: list[set[str]] = []
"""Circles that are still to be cut. The list may only become shorter."""


def module_name(package: str, folder: Path, path: Path) -> str:
    parts = [package, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    """The source of every module by its name."""
    return {
        module_name(package, folder, path): path.read_text()
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }


def imports(source: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The modules, of those in ``modules``, that ``source`` names in its import statements, wherever they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module in modules:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in modules else node.module


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (or of one that imports itself), each sorted."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        pending = list(graph[start])
        while pending:
            if (module := pending.pop()) not in found:
                found.add(module)
                pending += graph[module]
        return found

    reach = {module: reachable(module) for module in graph}
    found = {
        tuple(sorted({module, *(other for other in reach[module] if module in reach[other])}))
        for module in graph
        if module in reach[module]
    }
    return sorted(list(each) for each in found)


def import_graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    return {name: set(imports(source, modules)) for name, source in modules.items()}


def test_circles_are_found() -> None:
    modules = {
        "a": "import b",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from c import X",
        "c": "def f():\n    from d import e",
        "d": "",
        "d.e": "from a import Y",
        "f": "import a, d.e",
        "g": "import g",
    }
    assert circles(import_graph(modules)) == [["a", "b", "c", "d.e"], ["g"]]


def test_no_module_imports_itself_through_others() -> None:
    found = circles(import_graph(sources()))
    assert [circle for circle in found if not any(known.issuperset(circle) for known in KNOWN)] == []
    solved = [known for known in KNOWN if not any(known.issuperset(circle) for circle in found)]
    assert solved == [], "no circle any more: take them off the list"
