"""How figures look, in light and dark, and how they get into files and into the page.

A chart is a function of a `Theme`. `draw` calls it for the files (light) and for what the page
embeds: charts as SVG in both themes, pictures of CT once as PNG on the dark surface, as films are
read. Nothing here depends on the clock, so the same data give the same bytes.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pgpsam_jax.utils.files import atomic_path

_FILE_DPI, _PAGE_DPI = 200, 144  # of the PNG beside the page, of the PNG inside it


@dataclasses.dataclass(frozen=True)
class Theme:
    """Hex colours of a figure. `surface` is its background and that of the page.

    `rim` sets points off from their neighbours. `series` are Okabe and Ito's colours in an order
    for either surface: a contrast of 3 or more to it but for the last two, which need a rim.
    """

    name: str
    surface: str
    text: str
    muted: str
    line: str
    rim: str
    series: tuple[str, ...]

    @property
    def settings(self) -> dict:
        """matplotlib settings under which everything takes the theme's colours."""
        quiet = ("axes.edgecolor", "grid.color", "legend.edgecolor", "xtick.color", "ytick.color")
        dark = ("text.color", "axes.labelcolor", "axes.titlecolor")
        flat = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
        colours = dict.fromkeys(quiet, self.line) | dict.fromkeys(dark, self.text)
        colours |= dict.fromkeys(flat, self.surface)
        colours |= {"xtick.labelcolor": self.muted, "ytick.labelcolor": self.text}
        return colours | _SETTINGS


_SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,  # a row's label may hold dollar signs
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.facecolor": "auto",
    "svg.fonttype": "path",  # the layout is made for this font; a reader's own would not fit it
    "svg.hashsalt": "pgpsam_jax",
    "pdf.fonttype": 42,
}

LIGHT = Theme(
    name="light",
    surface="#FFFFFF",
    text="#1F2328",
    muted="#57606A",
    line="#D0D7DE",
    rim="#1F2328",
    series=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#1F2328", "#E69F00", "#56B4E9"),
)
DARK = Theme(
    name="dark",
    surface="#14181D",
    text="#E6EDF3",
    muted="#9DA7B3",
    line="#3A424B",
    rim="#14181D",
    series=("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E6EDF3", "#E69F00", "#0072B2"),
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure as the page shows it; `<stem>.png` and `.pdf` lie in the folder it was drawn to.

    `light`, `dark`: bytes of type `mime`; `dark` is None where one picture serves both themes.
    `alt` says what is to be seen, for those who cannot see it; the title where it is empty.
    """

    stem: str
    title: str
    caption: str
    light: bytes
    dark: bytes | None
    mime: str
    alt: str = ""


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure, inches; made without pyplot, so nothing global keeps it alive."""
    return Figure(figsize=(width, height), facecolor=theme.surface)


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
    """Write `<folder>/<stem>.png` and `.pdf` in the light theme and return what the page embeds.

    `make(theme)` is called under the theme's matplotlib settings: text, axes and ticks take its
    colours by themselves. `raster` is for pictures of CT: the page then gets one PNG (dark).
    """
    folder = Path(folder)
    page = {"format": "png", "dpi": _PAGE_DPI} if raster else {"format": "svg"}
    with matplotlib.rc_context(LIGHT.settings):
        figure = make(LIGHT)
        for kind in ("png", "pdf"):
            with atomic_path(folder / f"{stem}.{kind}") as temporary:
                _save(figure, temporary, kind, _FILE_DPI)
        light = None if raster else _bytes(figure, **page)
    with matplotlib.rc_context(DARK.settings):
        dark = _bytes(make(DARK), **page)
    if raster:
        return Picture(stem, title, caption, dark, None, "image/png", alt)
    return Picture(stem, title, caption, light, dark, "image/svg+xml", alt)


def _bytes(figure: Figure, format: str, dpi=_PAGE_DPI) -> bytes:
    file = io.BytesIO()
    _save(figure, file, format, dpi)
    return file.getvalue()


def _save(figure: Figure, target, kind: str, dpi: int) -> None:
    """Save without the date that matplotlib would put in."""
    clock = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    figure.savefig(target, format=kind, dpi=dpi, metadata=clock)
