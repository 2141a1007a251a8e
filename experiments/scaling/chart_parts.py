"""Parts that the charts of a study share: panels, styles, legend and axes."""

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from pgpsam_jax.visualization.theme import Theme, new_figure

_CHIPS = ("v4", "v5e", "v5p", "v6e")  # in order of the theme's colors
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (4, 1, 1, 1)))
_FILLS = ("full", "none", "left", "top")  # of markers, by mesh like the dashes: a point has no line


def grouped(rows) -> dict[tuple, list[dict]]:
    """Groups rows by (encoder, image size), the panels of a figure."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["encoder"], row["image_size"]), []).append(row)
    return {key: found[key] for key in sorted(found, key=lambda k: unique(found).index(k))}


def panels(rows, theme, height: float = 2.5, sharex: bool = True):
    """Returns figure and [(axes, rows)]: a row of panels per encoder, a column per image size."""
    groups = grouped(rows)
    encoders, sizes = unique(key[0] for key in groups), sorted({key[1] for key in groups})
    width = 9.9 if len(sizes) > 1 else 6.4
    figure = new_figure(width, 0.7 + height * len(encoders), theme)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    axes = figure.subplots(len(encoders), len(sizes), squeeze=False, sharex=sharex, sharey=False)
    found = []
    for i, encoder in enumerate(encoders):
        for j, size in enumerate(sizes):
            chosen = groups.get((encoder, size), [])
            axes[i, j].set_visible(bool(chosen))
            axes[i, j].set_title(f"{encoder}, {size} px")
            if chosen:
                found.append((axes[i, j], chosen))
    return figure, found


def chip_of(row) -> str:
    return row["topology"].split(":")[0]


def line_style(chip: str, mesh: int, theme: Theme) -> dict:
    """Returns color and marker by chip, dashes and fill by mesh."""
    place = _CHIPS.index(chip) if chip in _CHIPS else len(_CHIPS)
    return {
        "color": theme.series[place],
        "marker": "osD^v"[place],
        "markersize": 4.5,
        "linewidth": 1.6,
        "linestyle": DASHES[mesh % len(DASHES)],
        "fillstyle": _FILLS[mesh % len(_FILLS)],
    }


def marker_style(mark: str, color: str, theme: Theme) -> dict:
    return {
        "marker": mark,
        "markersize": 6,
        "color": color,
        "markeredgecolor": theme.rim,
        "markeredgewidth": 0.5,
        "zorder": 3,
    }


def legend(figure, rows, meshes, theme, extra) -> None:
    chips = unique(map(chip_of, rows))
    handles = [Line2D([], [], label=chip, **line_style(chip, 0, theme)) for chip in sorted(chips)]
    if len(meshes) > 1:
        handles += [
            Line2D(
                [],
                [],
                label=mesh,
                **line_style("", i, theme) | {"color": theme.text, "marker": "o"},
            )
            for i, mesh in enumerate(meshes)
        ]
    figure.legend(
        handles=[*handles, *extra], loc="outside upper left", ncols=min(8, len(handles) + 1)
    )


def outer_labels(figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9.5)
    figure.supylabel(y, fontsize=9.5)


def plain_numbers(axis, decades: bool = False) -> None:
    """Labels an axis with plain numbers; `decades`: 1, 2 and 5 of each power of ten."""
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    axis.set_minor_formatter(NullFormatter())
    if decades:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())


def unique(values) -> list:
    return list(dict.fromkeys(values))
