"""Plain text tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vmbus.printable import one_line


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Return a table with columns two spaces apart; those with their number in ``right`` are aligned to the right.

    No cell can add a row.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [
        max(len(head), *(len(row[i]) for row in rows)) if rows else len(head) for i, head in enumerate(heads)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(cells)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(heads), *(line(row) for row in rows)])
