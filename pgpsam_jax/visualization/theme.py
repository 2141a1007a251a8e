"""The look of figures in light and dark, and their PNG files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from pgpsam_jax.utils.files import atomic_path

_DPI = 110


@dataclasses.dataclass(frozen=True)
class Theme:
    """Hex colors of a figure; `surface` is the background of figure and page.

    `rim` outlines points. `series` are Okabe and Ito's colors, ordered by contrast with the
    surface: at least 3 except for the last two, which need a rim.
    """

    name: str
    surface: str
    text: str
    muted: str
    line: str
    rim: str
    series: tuple[str, ...]

    @property
    def settings(self) -> dict[Any, Any]:  # matplotlib enumerates the keys in its types
        """matplotlib settings with the theme's colors."""
        quiet = ("axes.edgecolor", "grid.color", "legend.edgecolor", "xtick.color", "ytick.color")
        dark = ("text.color", "axes.labelcolor", "axes.titlecolor")
        flat = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
        colors = dict.fromkeys(quiet, self.line) | dict.fromkeys(dark, self.text)
        colors |= dict.fromkeys(flat, self.surface)
        colors |= {"xtick.labelcolor": self.muted, "ytick.labelcolor": self.text}
        return colors | _SETTINGS


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


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure of width x height inches, unknown to pyplot and therefore freed after use."""
    return Figure(figsize=(width, height), facecolor=theme.surface)


def legend_above(figure: Figure, handles: Sequence[Artist], columns: int) -> None:
    """Adds a legend above the axes, filled row by row."""
    by_column = [handle for first in range(columns) for handle in handles[first::columns]]
    figure.legend(handles=by_column, loc="outside upper left", ncols=columns)


def save_png(figure: Figure, path: Path) -> Path:
    """Writes the figure atomically and returns its path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    return path
