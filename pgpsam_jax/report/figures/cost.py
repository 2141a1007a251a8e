"""Chart of Dice vs. compute, time and memory for the rows of an experiment grid."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pgpsam_jax.metrics.aggregate import spread
from pgpsam_jax.visualization.theme import Theme, legend_above, new_figure

_PANELS = {
    "forward_gflop": "forward pass (GFLOP per image)",
    "step_seconds": "training step (s)",
    "step_mib": "step memory (MiB)",
}
_MARKERS = "osD^vPX"


def dice_against_cost(rows, theme: Theme) -> Figure:
    """Mean Dice of each row, with SD over seeds, vs. its cost; rows of `cost_rows`."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    keys = [key for key in _PANELS if any(math.isfinite(row[key]) for row in rows)]
    columns = min(len(labels), max(1, 128 // (7 + max(map(len, labels)))), 5)
    figure = new_figure(9.9, 2.9 + 0.25 * math.ceil(len(labels) / columns), theme)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False).ravel()
    for ax, key in zip(axes, keys, strict=True):
        for place, label in enumerate(labels):
            chosen = [row for row in rows if row["label"] == label]
            pairs = [(row[key], 100 * row["dice_class_mean"]) for row in chosen]
            points = np.array([pair for pair in pairs if np.isfinite(pair).all()]).reshape(-1, 2)
            if points.size:
                _row(ax, points[:, 0], points[:, 1], _style(place, theme), theme)
        _x_axis(ax, [row[key] for row in rows if math.isfinite(row[key])], _PANELS[key])
        ax.grid(True)
    axes[0].set_ylabel("Dice (%), class mean")
    handles = [
        Line2D([], [], linestyle="none", markersize=7, label=label, **_style(place, theme))
        for place, label in enumerate(labels)
    ]
    legend_above(figure, handles, columns)
    return figure


def _row(ax, costs, scores, style, theme) -> None:
    """Draws seeds as small markers and their mean, at their median cost, as a large one."""
    sd, x, y = spread(scores)[0], np.median(costs), scores.mean()
    color = style["color"]
    if sd is not None:
        ax.errorbar(x, y, yerr=sd, color=color, elinewidth=1.2, capsize=3)
        ax.scatter(costs, scores, s=10, color=color, alpha=0.45, linewidths=0)
    ax.plot(x, y, markersize=8, zorder=3, **style)


def _style(place: int, theme: Theme) -> dict:
    """Color and shape by row index; neither alone has to distinguish the rows."""
    kinds = len(_MARKERS)
    return {
        "color": theme.series[place % len(theme.series)],
        "marker": _MARKERS[(place + place // kinds) % kinds],
        "markeredgecolor": theme.rim,
        "markeredgewidth": 0.5,
    }


def _x_axis(ax, values, label: str) -> None:
    """Starts the axis at zero, or makes it logarithmic if values span a factor of 20."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= 20:
        ax.set_xscale("log")
    else:
        ax.set_xlim(0, 1.12 * high or 1)
    ax.set_xlabel(label)
