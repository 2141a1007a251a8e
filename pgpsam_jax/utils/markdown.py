"""Markdown pipe tables."""

import re
from collections.abc import Sequence


def pipe_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, padded to read well as plain text too.

    rows: head and body, all with the same number of Markdown cells. The first column is
    left-aligned, the others are right-aligned.
    """
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [
        "| "
        + " | ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in [rows[0], rule, *rows[1:]]
    ]


def one_line(text: str) -> str:
    return " ".join(text.split())


def escape_cell(text: str) -> str:
    """Escapes text for a table cell."""
    signs = r"[\\|*<`$\[~]|&(?=[\w#])|(?<![^\W_])_|_(?![^\W_])"  # no `_` inside a word
    return re.sub(f"({signs})", r"\\\1", one_line(text))
