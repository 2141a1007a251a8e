"""The evaluation summary for a terminal: a few lines, however many organs there are."""

import math
from collections.abc import Mapping
from itertools import chain, zip_longest
from typing import Any

from pgpsam_jax.utils.markdown import one_line, pipe_table

ROWS, COLUMNS = 7, 2  # organs below and beside each other
_NAME = 24  # characters


def format_text(summary: Mapping[str, Any]) -> str:
    """Formats Dice and HD95 of protocol `strict`: the means and a table of organs."""
    strict, most = summary["strict"], ROWS * COLUMNS
    organs, count = list(strict["per_class"].items()), len(strict["per_class"])
    line = (
        f"class means (strict, {summary['n_cases']} case(s)): Dice "
        f"{_number(strict['dice_class_mean'], 3)}, HD95 {_number(strict['hd95_class_mean'], 1)} mm"
    )
    if count > most:
        line += f"; the {most} of {count} organs with the lowest Dice:"
        organs.sort(key=lambda organ: math.inf if organ[1]["dice"] is None else organ[1]["dice"])
        del organs[most:]
    cells = [
        [one_line(name)[:_NAME], _number(entry["dice"], 3), _number(entry["hd95"], 1)]
        for name, entry in organs
    ]
    height = len(cells) if len(cells) <= ROWS else -(-len(cells) // COLUMNS)
    columns = [cells[start : start + height] for start in range(0, len(cells), height)]
    head = ["organ", "Dice", "HD95 (mm)"] * len(columns)
    rows = zip_longest(*columns, fillvalue=[""] * 3)
    return "\n".join([line, *pipe_table([head, *([*chain(*row)] for row in rows)])])


def _number(value: Any, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
