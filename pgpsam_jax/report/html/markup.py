"""HTML elements. Only `escape` and `tables.to_html` turn text into markup."""

import base64
import dataclasses
import html
import os
from pathlib import Path
from unicodedata import category
from urllib.parse import quote

from pgpsam_jax.report.figures.picture import Picture
from pgpsam_jax.results.tables.text import Table, to_html

_CSS_PIXELS = 96 / 144  # CSS pixels per pixel of an embedded PNG


def escape(value) -> str:
    """Escapes text for HTML content and attributes; invalid characters become U+FFFD."""
    text = (c if c == "\n" or category(c) not in ("Cc", "Cs") else "\ufffd" for c in str(value))
    return html.escape("".join(text))


def section(anchor: str, title: str, *parts: str) -> str:
    body = "\n".join(part for part in parts if part)
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def link(path: str, text: str) -> str:
    """A link to a file beside the page."""
    return f'<a href="{escape(quote(os.fsencode(path)))}">{escape(text)}</a>'


def box(content: str, label: str, kind: str = "") -> str:
    """A box whose content scrolls, also by keyboard, if it is wider than the window."""
    attributes = f'class="{f"scroll {kind}".strip()}" role="region" tabindex="0"'
    return f'<div {attributes} aria-label="{escape(label)}">{content}</div>'


def tables(entries: list[Table], prefix: str, known=()) -> str:
    """Result tables without the prefix of their titles; repeated and `known` notes are dropped."""
    parts, seen = [], set(known)
    for table in entries:
        title = table.title.removeprefix(f"{prefix}: ")
        notes = [note for note in table.notes if note not in seen]
        seen.update(notes)
        table = dataclasses.replace(table, title=title[:1].upper() + title[1:], notes=notes)
        content, end, below = to_html(table).partition("</table>")
        kind = "dense" if len(table.head) > 8 else ""
        parts.append(box(content + end, table.title, kind) + below)
    return "\n".join(parts)


def text_table(head, rows, label: str, marked=()) -> str:
    """A table of text; rows with an index in `marked` are highlighted."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for place, (first, *rest) in enumerate(rows):
        kind = ' class="set"' if place in marked else ""
        body = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr{kind}><th scope="row">{escape(first)}</th>{body}</tr>')
    content = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return box(content, label, "text")


def figure(picture: Picture, folder: Path) -> str:
    """A picture with title, caption and links to its files in `folder`, beside the page.

    The reader's color scheme selects the light or dark version.
    """
    light = _data(picture.light, picture.mime)
    alt = escape(picture.alt or picture.title)
    image = f'<img src="{light}" alt="{alt}"{_size(picture)}>'
    if picture.dark is not None:
        dark = _data(picture.dark, picture.mime)
        twin = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        image = f"<picture>{twin}{image}</picture>"
    names = {kind: f"{picture.stem}.{kind.lower()}" for kind in ("PNG", "PDF", "CSV")}
    files = ", ".join(
        link(f"{folder.name}/{name}", kind)
        for kind, name in names.items()
        if (folder / name).is_file()
    )
    return (
        f"<figure>\n<h3>{escape(picture.title)}</h3>\n{box(image, picture.title)}\n"
        f"<figcaption>{escape(picture.caption)} Files: {files}.</figcaption>\n</figure>"
    )


def _data(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _size(picture: Picture) -> str:
    """Size attributes of a PNG, which has more pixels than it is displayed with; "" for SVG."""
    if picture.mime != "image/png":
        return ""
    width, height = (int.from_bytes(picture.light[at : at + 4], "big") for at in (16, 20))
    size = f'width="{width * _CSS_PIXELS:.0f}" height="{height * _CSS_PIXELS:.0f}"'
    return f' class="film" {size}'
