"""Documents and what refers to them: every link and every reference leads to a file, and to a heading in it.

Three forms are followed: a link in a document (``[text](rings.md#fences)``), the definition of one
(``[text]: rings.md#fences``), and a reference in code or prose (``docs/protocol/rings.md#fences``). Anchors follow
the rule of GitHub, which `make docs` follows as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("emulator", "device", "tests", "docs", "examples", "qemu-config")
SUFFIXES = frozenset({".py", ".c", ".h", ".md", ".asl", ".toml", ".yml", ".cfg", ".init", ".sh"})
FENCE = re.compile(r"^ *(```|~~~)")
HEADING = re.compile(r"#{1,6} +(.*?)(?: +#+)? *$")
EXPLICIT_ANCHOR = re.compile(r'<a (?:id|name)="([^"]+)"')
INLINE_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
LINK = re.compile(r"\]\(<?([^()\s>]+(?:\([^()\s]*\))?[^()\s>]*)>?(?: +\"[^\"]*\")?\)")
LINK_DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]: *<?([^\s>]+)")
WITH_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
REFERENCE = re.compile(r"(?<![\w./-])docs/(?:[\w-]+/)*[\w-]+\.md(?:#[\w-]+)?")
OUTSIDE_SHEET = re.compile(r"(?<![\w/-])spec/[\w-]+\.md|\(spec [0-9]")


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives a heading, before it counts repeated ones."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) for each line of a document that is not in a fenced block."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


def headings(text: str) -> Iterator[str]:
    """Yield the anchors of a document's headings, in order, repeated ones as they are."""
    for _, line in prose_lines(text):
        match = HEADING.match(line)
        if match:
            yield anchor_of(match[1])


def anchors(text: str) -> set[str]:
    """Return every anchor of a document: of its headings, and those that it names itself."""
    found: set[str] = set()
    times: dict[str, int] = {}
    for anchor in headings(text):
        count = times.get(anchor, 0)
        found.add(f"{anchor}-{count}" if count else anchor)
        times[anchor] = count + 1
    for _, line in prose_lines(text):
        found.update(EXPLICIT_ANCHOR.findall(line))
    return found


def links(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, target) for each link of a document that leads to no other place on the network."""
    for number, line in prose_lines(text):
        outside_code = INLINE_CODE.sub("", line)
        for target in (*LINK.findall(outside_code), *LINK_DEFINITION.findall(outside_code)):
            if not WITH_SCHEME.match(target):
                yield number, target


def complaint(target: str, folder: Path) -> str:
    """Return what is wrong with a target that is relative to `folder`; nothing if it exists."""
    name, _, anchor = target.partition("#")
    path = folder / name
    if not path.exists():
        return f"{target}: there is no such file"
    if anchor and path.suffix == ".md" and anchor not in anchors(path.read_text()):
        return f"{target}: there is no such heading"
    return ""


def documents(root: Path) -> Iterator[Path]:
    """Yield the documents of a tree: those in its root, in `docs` and in `examples`."""
    yield from sorted(root.glob("*.md"))
    for folder in ("docs", "examples"):
        yield from sorted((root / folder).rglob("*.md"))


def sources(root: Path) -> Iterator[Path]:
    """Yield every text of a tree that may refer to a document, but for this file: it quotes dead references."""
    yield from (path for path in sorted(root.iterdir()) if path.suffix in SUFFIXES or path.name == "Makefile")
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path != Path(__file__).resolve() and path.is_file():
                yield path


def dead_links(root: Path) -> list[str]:
    """Return, for each link that leads nowhere, where it stands and why."""
    found = []
    for path in documents(root):
        text = path.read_text()
        for number, target in links(text):
            wrong = complaint(path.name + target if target.startswith("#") else target, path.parent)
            if wrong:
                found.append(f"{path.relative_to(root)}:{number}: {wrong}")
    return found


def dead_references(root: Path) -> list[str]:
    """Return, for each `docs/...md#anchor` that leads nowhere, where it stands and why."""
    found = []
    for path in sources(root):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for target in REFERENCE.findall(line):
                wrong = complaint(target, root)
                if wrong:
                    found.append(f"{path.relative_to(root)}:{number}: {wrong}")
    return found


def test_every_link_leads_somewhere() -> None:
    assert dead_links(ROOT) == []


def test_every_reference_leads_to_a_heading() -> None:
    assert dead_references(ROOT) == []


def test_code_refers_to_the_protocol() -> None:
    """The pattern finds what it has to find: many references, in code and tests, with anchors."""
    referring = [
        path for path in sources(ROOT) if re.search(r"docs/protocol/[\w-]+\.md#\w", path.read_text())
    ]
    assert len([path for path in referring if path.suffix == ".py"]) > 50


def test_nothing_refers_to_sheets_outside_the_repository() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources(ROOT)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OUTSIDE_SHEET.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "protocol").glob("*.md")), ids=lambda path: path.name
)
def test_headings_of_the_protocol_name_one_subject_each(path: Path) -> None:
    """A repeated heading gets a number from the reader's software, and moves when a section is added."""
    names = list(headings(path.read_text()))
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Open channel", "open-channel"),
        ("The guest's TSC", "the-guests-tsc"),
        ("`dbus-vmstate`", "dbus-vmstate"),
        ("Save, restore: state_1", "save-restore-state_1"),
        ("Rescind / release", "rescind--release"),
        ("See [rings](rings.md)", "see-rings"),
    ],
)
def test_anchor_is_that_of_github(heading: str, anchor: str) -> None:
    assert anchor_of(heading) == anchor


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one document, of two headings of one name."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(
        '# A\n\n## Twice\n\n```\n# not one\n```\n\n## Twice\n<a id="row-1"></a>\n'
    )
    (tmp_path / "emulator").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "target", ["a.md", "#twice", "#twice-1", "a.md#row-1", "../emulator", "https://x.org/a.md"]
)
def test_live_links_pass(tree: Path, target: str) -> None:
    with (tree / "docs" / "a.md").open("a") as file:
        file.write(f"\n[x]({target})\n")
    assert dead_links(tree) == []


@pytest.mark.parametrize("target", ["b.md", "#not-one", "a.md#twice-2", "../emulator/none.py"])
@pytest.mark.parametrize("form", ["[x]({})", '[x]({} "title")', "[x]: {}", "![x]({})"])
def test_dead_links_are_found(tree: Path, form: str, target: str) -> None:
    with (tree / "docs" / "a.md").open("a") as file:
        file.write("\n" + form.format(target) + "\n")
    assert len(dead_links(tree)) == 1


def test_links_in_code_are_none(tree: Path) -> None:
    with (tree / "docs" / "a.md").open("a") as file:
        file.write("\n`[x](none.md)`\n\n```\n[x](none.md)\n```\n")
    assert dead_links(tree) == []


@pytest.mark.parametrize(
    ("reference", "dead"),
    [
        ("docs/a.md", 0),
        ("docs/a.md#twice.", 0),
        ("docs/a.md#thrice", 1),
        ("docs/b.md, docs/a.md#a", 1),
        ("../docs/elsewhere.md", 0),
    ],
)
def test_dead_references_are_found(tree: Path, reference: str, dead: int) -> None:
    (tree / "emulator" / "x.py").write_text(f'"""Source: {reference}"""\n')
    assert len(dead_references(tree)) == dead
