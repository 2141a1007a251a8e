"""The training curve of a run as one PNG file."""

import math
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d

from pgpsam_jax.visualization.overlays import CYCLE, DPI, save

_SIDES = ("validation_score", "lr", "learning_rate", "gradient_norm", "images_per_second")


def training_curve(records, path) -> None:
    """Refresh the picture of a run: losses, validation, learning rate, gradient, throughput.

    records: dictionaries of `metrics.jsonl` with `step` and numbers; only what is there is drawn.
    Faint lines are the records, strong ones a running mean over a fiftieth of them.
    """
    if not records:
        return
    keys = dict.fromkeys(key for record in records for key in record)
    losses = [key for key in keys if re.search(r"(^|_)(loss|ce|dice)($|_)", key)]
    sides = [key for key in _SIDES if key in keys]
    figure = Figure(figsize=(10, 4.5), dpi=DPI)
    # Fixed margins: a layout engine would draw everything twice.
    gap = 0.55 if len(sides) < 4 else 0.9
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.11, top=0.93, wspace=0.3, hspace=gap)
    grid = figure.add_gridspec(max(1, len(sides)), 3)
    main = figure.add_subplot(grid[:, :2] if sides else grid[:, :])
    for place, key in enumerate(losses):
        strong = key == "loss"
        _line(main, records, key, "black" if strong else CYCLE[place % 8], 2 if strong else 1.2)
    main.set(xlabel="step", title=f"training loss up to step {records[-1]['step']}")
    if losses:
        main.legend(frameon=False, fontsize=9)
    for place, key in enumerate(sides):
        ax = figure.add_subplot(grid[place, 2])
        _line(ax, records, key, CYCLE[4], 1.5)
        ax.set_title(key.replace("lr", "learning rate").replace("_", " "), fontsize=10)
    for ax in figure.axes:
        ax.grid(alpha=0.25)
        ax.xaxis.get_major_locator().set_params(integer=True)
        low, high = ax.get_ylim()
        ax.set(xlim=(0, None), ylim=(min(0, low), high + 0.05 * abs(high)))
    save(figure, Path(path))


def _line(ax, records, key, colour, width) -> None:
    pairs = [(r["step"], r[key]) for r in records if math.isfinite(r.get(key, math.nan))]
    pairs = pairs[:: max(1, len(pairs) // 2000)]  # more points than pixels only cost time
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    window = max(1, len(values) // 50)
    marker = "." if len(values) < 30 else None
    if window > 1:
        ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        values = uniform_filter1d(values, window, mode="nearest")
    label = key.replace("_", " ")
    ax.plot(steps, values, color=colour, linewidth=width, marker=marker, label=label)
