"""Make pages of this repository work both on a code host and as a site built by mkdocs.

Pages link to each other and to source files by paths of the repository, which is what a code host shows. mkdocs knows
only what is below `docs/`. This hook

- adds the documents that stand at the top of the repository (`ROOT_PAGES`) to the site;
- follows every relative link. A target that is a page becomes a link to that page. Any other file or folder of the
  repository becomes a link below `repo_url`, or, while no `repo_url` is set, the plain text with the path behind it.
  A target that does not exist is left as it is: mkdocs warns, and with `strict` the build fails;
- warns about lists that follow a line of text without an empty line: a code host shows a list, mkdocs a paragraph.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}
"""Documents at the top of the repository, and the pages that they become."""

log = logging.getLogger("mkdocs.hooks.repository_links")

_CODE = r"^(?P<fence>```|~~~).*?^(?P=fence)[^\n]*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
_LINK = re.compile(
    _CODE + r"|(?P<image>!?)\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>[^()\s]+)\)",
    re.DOTALL | re.MULTILINE,
)
_ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)
_ITEM = re.compile(r"( *)(?:[-*+]|\d+\.) ")
_BEGINS_A_LIST = re.compile(r"[-*+] |1\. ")
"""What begins a list in the middle of a paragraph on a code host; a line that begins with "0. " does not."""


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages at the top of the repository."""
    root = _root(config)
    for name, uri in ROOT_PAGES.items():
        if (root / name).is_file():
            files.append(File.generated(config, uri, content=(root / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite the relative links of a page, and warn about what a code host would show differently."""
    root = _root(config)
    here = page.file.src_uri
    at_top = {uri: name for name, uri in ROOT_PAGES.items()}
    original = at_top.get(here, f"docs/{here}")
    _warn_of_lists(original, markdown)

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or _ABSOLUTE.match(target):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(original), path))
        uri = ROOT_PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if uri is not None and files.get_file_from_path(uri) is not None:
            relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
            return f"{match['image']}[{match['text']}]({relative}{hash_sign}{anchor})"
        if path.startswith("../") or not (root / path).exists():
            return match[0]
        if config.repo_url:
            kind = "tree" if (root / path).is_dir() else "blob"
            address = f"{config.repo_url.rstrip('/')}/{kind}/main/{path}"
            return f"{match['image']}[{match['text']}]({address}{hash_sign}{anchor})"
        text = match["text"]
        return text if path in text else f"{text} (`{path}`)"

    return _LINK.sub(replaced, markdown)


def _root(config: Any) -> Path:
    return Path(config.docs_dir).parent


def _warn_of_lists(name: str, markdown: str) -> None:
    fenced = False
    before = ""
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.startswith(("```", "~~~")):
            fenced = not fenced
        item = None if fenced else _ITEM.match(line)
        begins = not fenced and _BEGINS_A_LIST.match(line) and before.strip() and not _ITEM.match(before)
        if begins and not before.startswith((" ", "#", "|", "<")):
            log.warning("%s:%d: a list needs an empty line before it", name, number)
        elif item and 0 < len(item[1]) < 4 and _ITEM.match(before):
            log.warning("%s:%d: a list inside a list is indented by four spaces", name, number)
        before = line
