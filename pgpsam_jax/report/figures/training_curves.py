"""Training curves: one run in detail, or the rows of a grid as mean and range over seeds."""

import math

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from pgpsam_jax.visualization.theme import Theme, legend_above, new_figure
from pgpsam_jax.visualization.training_curve import (
    curve_title,
    point_style,
    start_at_zero,
    training_figure,
)

_COMPARED = ("loss", "final_dice", "validation_score", "gradient_norm", "images_per_second")
_LINES = ("-", "--", ":", "-.")


def training(rows, theme: Theme) -> Figure:
    """Figure of `curve_rows`: all losses of one run, or the rows of a grid beside each other."""
    if len({(row["label"], row["seed"]) for row in rows}) > 1:
        return _compared(rows, theme)
    curves: dict[str, list] = {}
    for row in rows:
        curves.setdefault(row["key"], []).append((row["step"], row["value"]))
    return training_figure(curves, theme)


def _compared(rows, theme) -> Figure:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    keys = [key for key in _COMPARED if any(row["key"] == key for row in rows)]
    lines = math.ceil(len(keys) / 2)
    figure = new_figure(9.9, 0.4 + 2.4 * lines + 0.25 * math.ceil(len(labels) / 3), theme)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(lines, min(2, len(keys)), squeeze=False).ravel()
    for ax, key in zip(axes, keys, strict=False):
        for place, label in enumerate(labels):
            chosen = [row for row in rows if row["key"] == key and row["label"] == label]
            color = theme.series[place % len(theme.series)]
            style = _LINES[place // len(theme.series) % len(_LINES)]
            _mean_and_range(ax, chosen, label, color, style)
        ax.set(title=curve_title(key), xlabel="step")
    for ax in axes[len(keys) :]:
        ax.set_visible(False)
    columns = min(len(labels), max(1, 120 // max(map(len, labels))), 5)
    legend_above(figure, axes[0].get_legend_handles_labels()[0], columns)
    start_at_zero(figure)
    return figure


def _mean_and_range(ax, rows, label, color, style) -> None:
    """Mean over the seeds that reached a step, smoothed, and the range between them."""
    by_step: dict[float, list[float]] = {}
    for row in rows:
        if math.isfinite(row["value"]):
            by_step.setdefault(row["step"], []).append(row["value"])
    if not by_step:
        return
    steps = sorted(by_step)
    window = max(1, len(steps) // 25)
    low, mean, high = (
        uniform_filter1d([kind(by_step[step]) for step in steps], window, mode="nearest")
        for kind in (min, np.mean, max)
    )
    ax.fill_between(steps, low, high, color=color, alpha=0.16, linewidth=0)
    line = {"linewidth": 1.6, "linestyle": style, "label": label}
    ax.plot(steps, mean, color=color, **line, **point_style(len(steps)))
