"""Figures drawn into files and into the page.

A chart is a function of a `Theme`. `draw` calls it for the files (light) and for what the page
embeds: charts as SVG in both themes, CT images once as PNG on the dark surface, as films are read.
Nothing here depends on the clock, so the same data give the same bytes.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pgpsam_jax.utils.files import atomic_path
from pgpsam_jax.visualization.theme import DARK, LIGHT, Theme

_FILE_DPI, _PAGE_DPI = 200, 144  # of the PNG beside the page, of the PNG inside it


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure embedded in the page; its files are `<stem>.png` and `<stem>.pdf`.

    light, dark: bytes of type `mime`; `dark` is None if one image serves both themes.
    alt: description for readers who cannot see the figure; "" for the title.
    """

    stem: str
    title: str
    caption: str
    light: bytes
    dark: bytes | None
    mime: str
    alt: str = ""


def draw(
    make: Callable[[Theme], Figure],
    folder,
    stem: str,
    title: str,
    caption: str,
    *,
    raster: bool = False,
    alt: str = "",
) -> Picture:
    """Writes `<folder>/<stem>.png` and `.pdf` in the light theme.

    Args:
        make: function of a theme, called under the theme's matplotlib settings.
        folder: of the files.
        stem: of the file names.
        title, caption, alt: as in `Picture`.
        raster: embed one PNG (dark theme) instead of two SVGs; for CT images.

    Returns:
        The picture to embed in the page.
    """
    folder, light = Path(folder), None
    kind, mime = ("png", "image/png") if raster else ("svg", "image/svg+xml")
    with matplotlib.rc_context(LIGHT.settings):
        figure = make(LIGHT)
        for file_kind in ("png", "pdf"):
            with atomic_path(folder / f"{stem}.{file_kind}") as temporary:
                _save(figure, temporary, file_kind, _FILE_DPI)
        if not raster:
            light = _bytes(figure, kind)
    with matplotlib.rc_context(DARK.settings):
        dark = _bytes(make(DARK), kind)
    first, second = (dark, None) if light is None else (light, dark)
    return Picture(stem, title, caption, first, second, mime, alt)


def _bytes(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    _save(figure, file, kind, _PAGE_DPI)
    return file.getvalue()


def _save(figure: Figure, target, kind: str, dpi: int) -> None:
    """Saves without the date that matplotlib would add."""
    clock = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    figure.savefig(target, format=kind, dpi=dpi, metadata=clock)
