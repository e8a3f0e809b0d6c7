"""Make ``demo.svg``, the picture in the README: ``python docs/pictures/make_demo.py`` (needs rich and pyte).

Runs ``vmbus demo`` on a pseudo terminal, as a person would, and draws what it printed. The picture names no font
that a browser would have to fetch.
"""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pyte
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 118
ROWS = 100
FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def output_of(command: list[str]) -> str:
    """Return what ``command`` prints on a terminal of :data:`COLUMNS` columns; raise if it fails."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        printed = bytearray()
        while True:
            try:
                data = os.read(main, 65536)
            except OSError:  # the last writer has closed its end
                break
            if not data:
                break
            printed += data
    os.close(main)
    if process.returncode:
        raise SystemExit(printed.decode(errors="replace"))
    return printed.decode()


def screen_after(printed: str) -> list[str]:
    """Return the lines that a terminal shows in the end; the demo redraws its table in place."""
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.Stream(screen).feed(printed)
    return "\n".join(line.rstrip() for line in screen.display).rstrip().splitlines()


def main() -> None:
    lines = screen_after(output_of([sys.executable, "-m", "vmbus", "demo"]))
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in lines:
        console.print(Text(line), overflow="crop", no_wrap=True)
    target = Path(__file__).with_name("demo.svg")
    target.write_text(console.export_svg(title="make demo", theme=MONOKAI, code_format=FORMAT))
    print(f"{target}: {len(lines)} lines")


if __name__ == "__main__":
    main()
