"""Conformance rows and the tests that show them: `docs/conformance.md` against the marks in `tests`.

The last column of the tables is generated. As a program, this file compares, or with `--write` brings the column up
to date:

    python tests/unit/test_conformance.py --write
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "conformance.md"
MARK = "pytest.mark.conformance"
ROW = re.compile(r'\| <a id="row-(?P<anchor>\d+)"></a>(?P<row>\d+) \| (?P<cells>.*) \|')
NOT_COVERED = "## Not covered"

Marks = dict[int, list[str]]


def marked_rows(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[int]:
    """Yield the rows that a test or a class of tests is marked with.

    Raises ValueError for a mark whose row is not a plain number: nobody could find it.
    """
    for decorator in node.decorator_list:
        if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == MARK):
            continue
        for argument in decorator.args:
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, int)):
                raise ValueError(f"{node.name}: the row in {ast.unparse(decorator)} is not a number")
            yield argument.value


def marks_in(body: list[ast.stmt], prefix: str) -> Iterator[tuple[int, str]]:
    """Yield (row, pytest's name of the test) for each mark, classes included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}::{node.name}"
            for row in marked_rows(node):
                yield row, name
            if isinstance(node, ast.ClassDef):
                yield from marks_in(node.body, name)


def marks_of_rows(root: Path = ROOT) -> Marks:
    """Return the tests of each row, sorted, as `tests/unit/bus/test_gpadl.py::test_name`."""
    found: Marks = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        for row, name in marks_in(tree.body, path.relative_to(root).as_posix()):
            found.setdefault(row, []).append(name)
    return {row: sorted(names) for row, names in found.items()}


def cell(names: list[str]) -> str:
    """Return the last column of a row."""
    return "<br>".join(f"`{name}`" for name in names) or "-"


def rendered(text: str, found: Marks) -> str:
    """Return the document with its last column as the marks have it."""
    lines = text.splitlines()
    end = lines.index(NOT_COVERED)
    for number, line in enumerate(lines[:end]):
        if match := ROW.fullmatch(line):
            rest, _, _ = line.removesuffix(" |").rpartition(" | ")
            lines[number] = f"{rest} | {cell(found.get(int(match['row']), []))} |"
    return "\n".join(lines) + "\n"


def rows_of(text: str) -> dict[int, list[str]]:
    """Return the cells of each row beside its number; columns are split at bars."""
    rows: dict[int, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith('| <a id="row-'):
            continue
        match = ROW.fullmatch(line)
        assert match is not None, f"not of the form of a row: {line}"
        row = int(match["row"])
        assert match["anchor"] == match["row"], f"row {row} has the anchor of row {match['anchor']}"
        assert row not in rows, f"row {row} is there twice"
        rows[row] = match["cells"].split(" | ")
    return rows


def covered_and_not() -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    covered, heading, absent = DOCUMENT.read_text().partition(f"\n{NOT_COVERED}\n")
    assert heading, f"{DOCUMENT.name} has no section {NOT_COVERED!r}"
    return rows_of(covered), rows_of(absent)


def test_every_mark_is_found() -> None:
    """What the reader of decorators does not see (a mark on a parameter, a list of marks) would be in no row."""
    written = 0
    for path in (ROOT / "tests").rglob("*.py"):
        if path != Path(__file__):
            written += len(re.findall(r"\bconformance\(", path.read_text()))
    assert written == sum(len(names) for names in marks_of_rows().values())
    assert written > 100, "are the tests still there?"


def test_every_row_names_its_tests_and_every_test_is_named_by_its_row() -> None:
    covered, _ = covered_and_not()
    marks = marks_of_rows()
    named = {row: re.findall(r"`([^`]+)`", cells[-1]) for row, cells in covered.items()}
    wrong = [
        f"row {row}: the document names {named.get(row, 'no such row')}, marked are {marks.get(row, 'none')}"
        for row in sorted(named.keys() | marks.keys())
        if named.get(row) != marks.get(row)
    ]
    assert not wrong, "\n".join([*wrong, "run: python tests/unit/test_conformance.py --write"])


def test_every_covered_row_has_a_test() -> None:
    covered, _ = covered_and_not()
    marks = marks_of_rows()
    untested = sorted(row for row in covered if row not in marks)
    assert not untested, f"no test is marked with rows {untested}: mark one, or list them as not covered"


def test_what_is_not_covered_is_not_marked() -> None:
    _, absent = covered_and_not()
    marked = absent.keys() & marks_of_rows().keys()
    assert not marked, f"rows {sorted(marked)} have tests: they belong to the tables above"


def test_rows_are_numbered_without_a_gap_and_complete() -> None:
    covered, absent = covered_and_not()
    assert not covered.keys() & absent.keys()
    numbers = sorted(covered | absent)
    assert numbers == list(range(1, len(numbers) + 1))
    for rows, columns in ((covered, 4), (absent, 3)):
        for row, cells in rows.items():
            assert len(cells) == columns, f"row {row} has {len(cells)} columns beside its number"
            assert all(len(text) > 1 for text in cells), f"row {row} has an empty column"


def test_sources_are_defined() -> None:
    text = DOCUMENT.read_text()
    used = set(re.findall(r"\]\[([a-z0-9]+)\]", text))
    defined = set(re.findall(r"^\[([a-z0-9]+)\]: https://\S+$", text, re.MULTILINE))
    assert used == defined


def test_the_generated_column_follows_the_marks() -> None:
    page = f'| <a id="row-7"></a>7 | a | b | c | `old` |\n\n{NOT_COVERED}\n\n| <a id="row-8"></a>8 | a | b | c |\n'
    fresh = rendered(page, {7: ["tests/test_a.py::test_x", "tests/test_a.py::test_y"], 8: ["never"]})
    assert fresh == page.replace("`old`", "`tests/test_a.py::test_x`<br>`tests/test_a.py::test_y`")
    assert "| c | - |" in rendered(page, {})


def test_marks_of_classes_methods_and_coroutines_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "@pytest.mark.conformance(3)\nclass TestA:\n    @pytest.mark.conformance(4)\n    def test_b(self): ...\n"
        "@pytest.mark.conformance(3)\n@pytest.mark.conformance(5)\nasync def test_c(): ...\n"
    )
    assert marks_of_rows(tmp_path) == {
        3: ["tests/test_it.py::TestA", "tests/test_it.py::test_c"],
        4: ["tests/test_it.py::TestA::test_b"],
        5: ["tests/test_it.py::test_c"],
    }


def main() -> int:
    text = DOCUMENT.read_text()
    fresh = rendered(text, marks_of_rows())
    if fresh == text:
        return 0
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(fresh)
        return 0
    print(f"{DOCUMENT}: the last column is not what the marks say; run this with --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
