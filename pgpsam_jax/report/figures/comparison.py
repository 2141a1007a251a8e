"""Charts of scores and times: each draws the rows of one CSV file in the colors of a theme."""

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from pgpsam_jax.metrics.aggregate import spread
from pgpsam_jax.visualization.overlays import palette
from pgpsam_jax.visualization.theme import Theme, new_figure

_WIDTH = 9.9  # inches of a full-width figure
_NAMES = {"dice": "Dice (%)", "hd95": "HD95 (mm)", "nsd": "NSD (%)"}


def distribution(rows, theme: Theme) -> Figure:
    """One point per case and organ over quartile box and median; rows of `score_rows`."""
    labels, organs = _unique(rows, "label"), _unique(rows, "class")
    order = sorted({(int(row["class_id"]), row["class"]) for row in rows})
    colors = palette(["background", *(name for _, name in order)])
    if len(labels) > 1:
        return _organ_panels(rows, labels, [name for _, name in order], colors, theme)
    figure, ax = _strip_axes([name.replace("_", " ") for _, name in order], theme)
    for y, (_, name) in enumerate(order):
        values = _scores(row for row in rows if row["class"] == name)
        _strip(ax, y, values, colors[name], theme)
        mean = f"{values.mean():.2f}" if values.size else "n/a"
        _aside(ax, y, (mean, len(values)), theme.text)
    _aside(ax, -0.75, ("mean", "n"), theme.muted)
    ax.set(xlabel=_NAMES[rows[0]["metric"]], ylim=(len(organs) - 0.5, -0.6))
    _limits([ax], rows)
    return figure


def _organ_panels(rows, labels, organs, colors, theme) -> Figure:
    columns = min(4, len(organs))
    lines = math.ceil(len(organs) / columns)
    figure = new_figure(_WIDTH, 0.4 + lines * (0.75 + 0.3 * len(labels)), theme)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, organ in zip(axes, organs, strict=False):
        counts = []
        for y, label in enumerate(labels):
            chosen = [r for r in rows if r["class"] == organ and r["label"] == label]
            values = _scores(chosen)
            counts.append(len(values))
            _strip(ax, y, values, colors[organ], theme, size=17)
        count = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else counts[0]
        ax.set_title(f"{organ.replace('_', ' ')}  (n = {count})", fontsize=9.5)
        ax.grid(axis="x")
        ax.tick_params(length=0)
    for ax in axes[len(organs) :]:
        ax.set_visible(False)
    axes[0].set(yticks=range(len(labels)), yticklabels=map(_wrapped, labels))
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    _limits(axes, rows)
    figure.supxlabel(_NAMES[rows[0]["metric"]], fontsize=9.5)
    return figure


def comparison(rows, theme: Theme) -> Figure:
    """Class-mean Dice per row: seeds as points, mean and 95 % t interval; rows of `seed_rows`."""
    labels = _unique(rows, "label")
    reference = {row["label"] for row in rows if row["reference"]}
    names = [f"{label} (reference)" if label in reference else label for label in labels]
    figure, ax = _strip_axes(names, theme)
    for y, label in enumerate(labels):
        values = _finite(100 * row["dice_class_mean"] for row in rows if row["label"] == label)
        if not values.size:
            continue
        mean, interval = values.mean(), spread(values)[1]
        color = theme.muted if label in reference else theme.series[0]
        if interval is not None:
            ax.errorbar(mean, y, xerr=interval[1] - mean, color=color, capsize=4, linewidth=2)
        ax.plot([mean, mean], [y - 0.22, y + 0.22], color=color, linewidth=3)
        _points(ax, values, y, color, theme)
        _aside(ax, y, (f"{mean:.2f}", len(values)), theme.text)
    _aside(ax, -0.75, ("mean", "n"), theme.muted)
    ax.set(xlabel="Dice (%), class mean", ylim=(len(labels) - 0.5, -0.6))
    return figure


def differences(rows, theme: Theme) -> Figure:
    """Per-case differences from the reference row; rows of `paired_rows`."""
    labels = _unique(rows, "label")
    figure, ax = _strip_axes(labels, theme)
    ax.axvline(0, color=theme.text, linewidth=1)
    for y, label in enumerate(labels):
        values = _finite(100 * row["difference"] for row in rows if row["label"] == label)
        color = theme.series[2] if np.median(values) >= 0 else theme.series[1]
        _strip(ax, y, values, color, theme)
        better = f"{np.count_nonzero(values > 0)} of {len(values)}"
        _aside(ax, y, (f"{np.median(values):+.2f}", better), theme.text, wide=True)
    _aside(ax, -0.75, ("median", "better"), theme.muted, wide=True)
    ax.set_xlabel(f"Dice points vs. {_short(rows[0]['against'], 40)}")
    ax.set_ylim(len(labels) - 0.5, -0.6)
    return figure


def axis_curve(rows, theme: Theme) -> Figure:
    """Dice vs. the quantity that the rows vary, with SD over seeds; rows of `seed_rows`."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if math.isfinite(row["value"]) and math.isfinite(row["dice_class_mean"]):
            found.setdefault(row["value"], []).append(100 * row["dice_class_mean"])
    x = np.array(sorted(found))
    mean = np.array([np.mean(found[value]) for value in x])
    sd = np.array([np.std(found[v], ddof=1) if len(found[v]) > 1 else math.nan for v in x])
    figure = new_figure(7.2, 3.6, theme)
    figure.set_layout_engine("constrained")
    ax, color = figure.add_subplot(), theme.series[0]
    ax.errorbar(x, mean, yerr=sd, color=color, linewidth=2, elinewidth=1.2, capsize=4)
    for value in x:
        ax.scatter([value] * len(found[value]), found[value], **_dot(color, theme), zorder=3)
    if x[0] > 0 and x[-1] / x[0] >= 20:
        ax.set_xscale("log")
        ax.minorticks_off()
    if len(x) <= 8:
        ax.set_xticks(x, [f"{value:g}" for value in x])
    ax.set(xlabel=rows[0]["axis"] or "value", ylabel="Dice (%), class mean")
    ax.grid(axis="y")
    return figure


def timing(rows, theme: Theme) -> Figure:
    """Stacked bars of time per activity, one per run or row; rows of `timing_rows`."""
    labels, activities = _unique(rows, "label"), _unique(rows, "activity")
    totals = [sum(row["seconds"] for row in rows if row["label"] == label) for label in labels]
    unit, scale = ("min", 60) if max(totals) > 180 else ("s", 1)
    figure, ax = _strip_axes(labels, theme)
    left, handles = np.zeros(len(labels)), []
    colors = theme.series[:4] + theme.series[5:] + (theme.muted,)
    for place, activity in enumerate(activities):
        color, seconds = colors[place % len(colors)], np.zeros(len(labels))
        for row in rows:
            if row["activity"] == activity:
                seconds[labels.index(row["label"])] += row["seconds"]
        rim, places = theme.surface, range(len(labels))
        ax.barh(places, seconds / scale, 0.6, left, color=color, edgecolor=rim, linewidth=0.8)
        left = left + seconds / scale
        handles.append(Patch(color=color, label=activity.replace("_", " ")))
    for y, total in enumerate(totals):
        _aside(ax, y, (f"{total / scale:.1f} {unit}",), theme.text)
    figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(handles)))
    ax.set(xlabel=f"time ({unit})", ylim=(len(labels) - 0.5, -0.5), xlim=(0, None))
    return figure


def _strip_axes(names, theme) -> tuple[Figure, Axes]:
    """Axes with a horizontal lane per name and room for numbers on the right."""
    names = [_wrapped(name) for name in names]
    figure = new_figure(_WIDTH, 0.95 + 0.42 * len(names), theme)
    figure.set_layout_engine("constrained")
    ax = figure.add_subplot()
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    return figure, ax


def _strip(ax, y, values, color, theme, size=22) -> None:
    """Quartile box, median line and all points of one lane."""
    if not values.size:
        return
    low, middle, high = np.percentile(values, (25, 50, 75))
    ax.add_patch(Rectangle((low, y - 0.28), high - low, 0.56, color=color, alpha=0.25, lw=0))
    ax.plot([middle, middle], [y - 0.28, y + 0.28], color=theme.text, linewidth=1.6)
    _points(ax, values, y, color, theme, size)


def _points(ax, values, y, color, theme, size=22) -> None:
    """Draws points, offset by a fixed low-discrepancy sequence to keep equal values apart."""
    offsets = (np.arange(1, len(values) + 1) * 0.618034) % 1 - 0.5
    ax.scatter(values, y + 0.4 * offsets, **_dot(color, theme, size), zorder=3)


def _dot(color, theme, size=22) -> dict:
    return {"s": size, "color": color, "edgecolors": theme.rim, "linewidths": 0.5}


def _aside(ax, y, cells, color, wide=False) -> None:
    """Writes right-aligned columns of text beside a lane."""
    for x, cell in zip((1.07, 1.15 if wide else 1.11), cells, strict=False):
        style = {"fontsize": 9, "va": "center", "ha": "right", "color": color}
        ax.text(x, y, str(cell), transform=ax.get_yaxis_transform(), **style)


def _limits(axes, rows) -> None:
    """Sets x limits: Dice and NSD end at 100 and start at 0 if values are low; HD95 at 0."""
    values = _scores(rows)
    if not values.size:
        return
    if rows[0]["metric"] == "hd95":
        limits = 0, 1.06 * values.max() or 1
    else:
        start = 10 * math.floor(values.min() / 10 - 0.5)
        limits = -2 if start < 25 else start, 100.5
    for ax in axes:
        ax.set_xlim(*limits)
        ax.xaxis.set_major_locator(MaxNLocator(8 if len(axes) == 1 else 4, steps=[1, 2, 5, 10]))


def _scores(rows) -> np.ndarray:
    """The defined values of `score_rows`, shares in %."""
    return _finite(row["value"] * (1 if row["metric"] == "hd95" else 100) for row in rows)


def _finite(values) -> np.ndarray:
    values = np.array(list(values), float)
    return values[np.isfinite(values)]


def _unique(rows, key) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def _short(text, length) -> str:
    return textwrap.shorten(text, length, placeholder=" …") or text[:length]


def _wrapped(name) -> str:
    """Wraps a name to at most two lines of 26 characters."""
    return textwrap.fill(name, 26, max_lines=2, placeholder=" …", break_on_hyphens=False)
