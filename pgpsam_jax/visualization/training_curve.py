"""The training curve of a run: losses beside validation score, learning rate and throughput."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from pgpsam_jax.utils.files import StrPath
from pgpsam_jax.visualization.theme import LIGHT, Theme, new_figure, save_png

_SIDE_PANELS = ("validation_score", "learning_rate", "gradient_norm", "images_per_second")
_MAX_POINTS = 400  # of a curve: more than a reader can tell apart
Curve = Sequence[tuple[int, float]]  # (step, value)
_WORDS = {"ce": "cross-entropy", "dice": "Dice loss"}


def write_training_curve(records: Sequence[Mapping[str, Any]], path: StrPath) -> None:
    """Writes the curve of the records of `metrics.jsonl` as PNG; nothing while there are none."""
    if records:
        with matplotlib.rc_context(LIGHT.settings):
            save_png(training_figure(curves_of(records), LIGHT), Path(path))


def curves_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Curves of every number in records of `metrics.jsonl`, at most 400 per curve."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                curves.setdefault(key, []).append((record["step"], value))
    return {key: points[:: math.ceil(len(points) / _MAX_POINTS)] for key, points in curves.items()}


def training_figure(curves: Mapping[str, Curve], theme: Theme) -> Figure:
    """Figure of the curves of one run; keys without a panel are left out.

    curves: by the keys of `metrics.jsonl`. Faint lines are the records, strong ones
    their running mean over a fiftieth of them.
    """
    losses = [key for key in curves if key == "loss" or key.endswith(("_ce", "_dice"))]
    losses.sort(key=lambda key: key != "loss")
    sides = [key for key in _SIDE_PANELS if key in curves]
    figure = new_figure(9.9, 4.4, theme)
    # Fixed margins: a layout engine would draw everything twice.
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.11, top=0.93, wspace=0.28, hspace=0.45)
    cells = figure.add_gridspec(max(1, len(sides)), 3)
    main = figure.add_subplot(cells[:, :2] if sides else cells[:, :])
    colors = [*theme.series[:4], *theme.series[5:]]
    for place, key in enumerate(losses):
        color, width = (theme.text, 2.4) if key == "loss" else (colors[place % 6], 1.4)
        _smooth_line(main, curves[key], key, color, width)
    main.set(title="losses", xlabel="step")
    if losses:
        main.legend(loc="upper right")
    for place, key in enumerate(sides):
        ax = figure.add_subplot(cells[place, 2])
        _smooth_line(ax, curves[key], key, theme.series[0], 1.6)
        ax.set_title(curve_title(key))
        if place < len(sides) - 1:
            ax.tick_params(labelbottom=False)
    figure.axes[-1].set_xlabel("step")
    start_at_zero(figure)
    return figure


def _smooth_line(ax: Axes, points: Curve, key: str, color: str, width: float) -> None:
    steps, values = np.array([p for p in points if math.isfinite(p[1])], float).reshape(-1, 2).T
    window = max(1, len(values) // 50)
    if window > 1:
        ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
        values = uniform_filter1d(values, window, mode="nearest")
    style = point_style(len(values))
    ax.plot(steps, values, color=color, linewidth=width, label=curve_title(key), **style)


def point_style(count: int) -> dict[str, Any]:
    """Line style that also marks the points of a short curve."""
    return {"marker": ".", "markersize": 5} if count < 30 else {}


def start_at_zero(figure: Figure) -> None:
    """Adds grid lines, includes zero in every axis, and puts ticks at whole steps."""
    for ax in figure.axes:
        ax.grid(True)
        ax.locator_params("x", integer=True)
        low, high = ax.get_ylim()
        ax.set(xlim=(0, None), ylim=(min(0, low), high))


def curve_title(key: str) -> str:
    return " ".join(_WORDS.get(word, word) for word in key.split("_"))
