"""Training curves: one run in detail, or the rows of a grid as mean and range over seeds."""

import math

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from pgpsam_jax.report.figures.theme import Theme, new_figure

_SIDES = ("validation_score", "learning_rate", "gradient_norm", "images_per_second")
_COMPARED = ("loss", "final_dice", "validation_score", "gradient_norm", "images_per_second")
_LINES = ("-", "--", ":", "-.")
_WORDS = {"ce": "cross-entropy", "dice": "Dice loss"}


def training(rows, theme: Theme) -> Figure:
    """The curves of `curve_rows`: all losses of one run, or the rows of a grid side by side."""
    if len({(row["label"], row["seed"]) for row in rows}) == 1:
        return _one_run(rows, theme)
    return _compared(rows, theme)


def _one_run(rows, theme) -> Figure:
    keys = dict.fromkeys(row["key"] for row in rows)
    losses = [key for key in keys if key == "loss" or key.endswith(("_ce", "_dice"))]
    losses.sort(key=lambda key: key != "loss")
    sides = [key for key in _SIDES if key in keys]
    figure = new_figure(9.9, 4.4, theme)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    grid = figure.add_gridspec(max(1, len(sides)), 3)
    main = figure.add_subplot(grid[:, :2] if sides else grid[:, :])
    for place, key in enumerate(losses):
        colour = theme.text if key == "loss" else [*theme.series[:4], *theme.series[5:]][place % 6]
        _smooth_line(main, rows, key, colour, 2.4 if key == "loss" else 1.4, theme)
    main.set(title="losses", xlabel="step")
    main.legend(loc="upper right")
    for place, key in enumerate(sides):
        ax = figure.add_subplot(grid[place, 2])
        _smooth_line(ax, rows, key, theme.series[0], 1.6, theme)
        ax.set_title(_name(key))
        if place < len(sides) - 1:
            ax.tick_params(labelbottom=False)
    figure.axes[-1].set_xlabel("step")
    _finish(figure)
    return figure


def _smooth_line(ax, rows, key, colour, width, theme) -> None:
    """Faint: the records; strong: their running mean over a fiftieth of them."""
    steps, values = _series(row for row in rows if row["key"] == key)
    window = max(1, len(values) // 50)
    if window > 1:
        ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        values = uniform_filter1d(values, window, mode="nearest")
    marker = {"marker": ".", "markersize": 5} if len(values) < 30 else {}
    ax.plot(steps, values, color=colour, linewidth=width, label=_name(key), **marker)


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
            colour = theme.series[place % len(theme.series)]
            style = _LINES[place // len(theme.series) % len(_LINES)]
            _mean_and_range(ax, chosen, label, colour, style)
        ax.set(title=_name(key), xlabel="step")
    for ax in axes[len(keys) :]:
        ax.set_visible(False)
    columns = min(len(labels), max(1, 120 // max(map(len, labels))), 5)
    handles = axes[0].get_legend_handles_labels()[0]
    by_line = [handle for first in range(columns) for handle in handles[first::columns]]
    figure.legend(handles=by_line, loc="outside upper left", ncols=columns)
    _finish(figure)
    return figure


def _mean_and_range(ax, rows, label, colour, style) -> None:
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
    ax.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
    marker = {"marker": ".", "markersize": 5} if len(steps) < 30 else {}
    ax.plot(steps, mean, color=colour, linewidth=1.6, linestyle=style, label=label, **marker)


def _series(rows):
    pairs = [(row["step"], row["value"]) for row in rows if math.isfinite(row["value"])]
    return np.array(pairs, float).reshape(-1, 2).T


def _finish(figure) -> None:
    for ax in figure.axes:
        ax.grid(True)
        low, high = ax.get_ylim()
        ax.set(xlim=(0, None), ylim=(min(0, low), high))


def _name(key: str) -> str:
    return " ".join(_WORDS.get(word, word) for word in key.split("_"))
