"""Tables of text with their number formats, written as Markdown, LaTeX (booktabs) and HTML.

Cells and notes are plain text; text between backticks in titles and notes is set as code.
"""

import dataclasses
import html
import math
import re

from pgpsam_jax.metrics.aggregate import Scores
from pgpsam_jax.utils.markdown import escape_cell, one_line, pipe_table

NONE, UNDEFINED = "-", "n/a"  # no result yet; an undefined number


@dataclasses.dataclass(frozen=True)
class Table:
    """Title, column heads, rows with one cell per head, and notes below the table."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def number(value, digits: int = 2, sign: bool = False) -> str:
    """Fixed digits; `UNDEFINED` for None and NaN."""
    if value is None or math.isnan(value):
        return UNDEFINED
    return f"{value:{'+' if sign else ''}.{digits}f}"


def percent(share, sign: bool = False) -> str:
    """A share (0..1), or a difference of shares, in % with two digits."""
    return number(None if share is None else 100 * share, sign=sign)


def plus_minus(mean, sd, write=number) -> str:
    """Mean ± SD; only the mean if there is no SD."""
    return write(mean) if sd is None or math.isnan(mean) else f"{write(mean)} ± {write(sd)}"


def class_mean(scores: Scores | None, write=number) -> str:
    """Class mean ± SD over seeds; `NONE` without scores."""
    return NONE if scores is None else plus_minus(*scores.over_seeds("class"), write)


def interval(ends, write=number) -> str:
    return UNDEFINED if ends is None else " to ".join(write(end) for end in ends)


def display_name(name: str) -> str:
    """An organ's name for readers."""
    return name.replace("_", " ")


def to_markdown(table: Table, level: int = 2) -> str:
    """A section with a pipe table and its notes."""
    lines = pipe_table([[escape_cell(cell) for cell in row] for row in [table.head, *table.rows]])
    notes = ["", *(f"- {_prose(note)}" for note in table.notes)] if table.notes else []
    return "\n".join([f"{'#' * level} {_prose(table.title)}", "", *lines, *notes]) + "\n"


def to_latex(table: Table) -> str:
    """A `table` environment; it only needs the package booktabs."""
    columns = "l" + "r" * (len(table.head) - 1)
    body = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in [table.head, *table.rows]]
    notes = [rf"\item {_latex(note)}" for note in table.notes]
    if notes:
        box = [r"\begin{minipage}{\linewidth}", r"\footnotesize", r"\begin{itemize}"]
        notes = [r"\par\medskip", *box, *notes, r"\end{itemize}", r"\end{minipage}"]
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        r"\scriptsize" if len(table.head) > 10 else r"\footnotesize",
        r"\setlength{\tabcolsep}{3pt}",
        r"\makebox[\linewidth][c]{%",  # centered even if it is wider than the text
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        body[0],
        r"\midrule",
        *body[1:],
        r"\bottomrule",
        r"\end{tabular}}",
        *notes,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_html(table: Table) -> str:
    """A `<table>` with caption, scoped heads and a list of notes; no styling."""
    head = "".join(f'<th scope="col">{_html(cell)}</th>' for cell in table.head)
    rows = [
        f'<tr><th scope="row">{_html(first)}</th>'
        + "".join(f"<td>{_html(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    ]
    notes = [f"<li>{_html(note, code=True)}</li>" for note in table.notes]
    lines = ["<table>", f"<caption>{_html(table.title, code=True)}</caption>"]
    lines += [f"<thead><tr>{head}</tr></thead>", "<tbody>", *rows, "</tbody>", "</table>"]
    return "\n".join(lines + (["<ul>", *notes, "</ul>"] if notes else [])) + "\n"


def _prose(text: str) -> str:
    """Escapes Markdown outside code; a lone `<` between spaces needs no escape."""
    parts = re.split(r"(`[^`]+`)", one_line(text))
    parts[::2] = [re.sub(r"([\\*]|<(?=[A-Za-z/!]))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _html(text: str, code: bool = False) -> str:
    text = html.escape(one_line(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text) if code else text


_LATEX = {character: f"\\{character}" for character in "%&$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    '"': "''",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "→": r"$\to$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{GREEK SMALL LETTER ALPHA}": r"$\alpha$",
    "\N{GREEK SMALL LETTER BETA}": r"$\beta$",
}


def _latex(text: str) -> str:
    """Escapes text; a hyphen before a number becomes a minus sign."""
    parts = re.split(r"`([^`]+)`", one_line(text))
    escaped = ["".join(_LATEX.get(character, character) for character in part) for part in parts]
    escaped = [re.sub(r"(?<![\w.)])-(?=\d)", "$-$", part) for part in escaped]
    return "".join(rf"\texttt{{{p}}}" if i % 2 else p for i, p in enumerate(escaped))
