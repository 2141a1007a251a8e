"""Charts of a study: each draws the rows of one CSV file in the colors of a theme."""

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.scaling.chart_parts import (
    DASHES,
    chip_of,
    grouped,
    legend,
    line_style,
    marker_style,
    outer_labels,
    panels,
    plain_numbers,
    unique,
)
from experiments.scaling.kinds import COMPILED, MEASURED
from pgpsam_jax.visualization.theme import Theme, new_figure

_TERMS = {"compute": "compute", "hbm": "memory (HBM)", "ici": "network (ICI)"}
_MARKERS = "osD"


def throughput(rows, theme: Theme) -> Figure:
    """Draws estimated images per second against chips, and perfect scaling."""
    return _against_chips(
        rows, theme, "estimate_images_per_second", "images/s (estimate)", ideal=True
    )


def efficiency(rows, theme: Theme) -> Figure:
    """Draws estimated images per second and chip, relative to the smallest slice."""
    return _against_chips(rows, theme, "estimate_efficiency", "efficiency (estimate)")


def _against_chips(rows, theme, column, label, ideal=False) -> Figure:
    meshes = unique(row["mesh"] for row in rows)
    figure, parts = panels(rows, theme)
    for axes, chosen in parts:
        for line in _longest(chosen):
            first = line[0]
            x, y = [row["chips"] for row in line], [row[column] for row in line]
            mesh = meshes.index(first["mesh"])
            axes.plot(_beside(x, mesh), y, **line_style(chip_of(first), mesh, theme))
            if ideal and len(line) > 1:
                ends = [y[0], y[0] * x[-1] / x[0]]
                axes.plot([x[0], x[-1]], ends, color=theme.muted, linewidth=0.9, linestyle=":")
        axes.set_xscale("log", base=2)
        plain_numbers(axes.xaxis)
        axes.grid(True)
        if ideal:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis, decades=True)
        else:
            axes.set_ylim(0, 1.08 * max([1.0, *(line.get_ydata().max() for line in axes.lines)]))
    outer_labels(figure, "chips", label)
    extra = [Line2D([], [], color=theme.muted, linestyle=":", label="ideal")] if ideal else []
    legend(figure, rows, meshes, theme, extra)
    return figure


def _longest(rows) -> list[list[dict]]:
    """Returns the series over most slices per chip and mesh, then with the largest batch."""
    found = {}
    for line in COMPILED.series(rows):
        key = chip_of(line[0]), line[0]["mesh"]
        size = len(line), line[0]["batch"]
        if key not in found or size > found[key][0]:
            found[key] = size, line
    return [line for _, line in found.values()]


def memory(rows, theme: Theme) -> Figure:
    """Draws bytes per chip against batch, on the smallest slice of each chip and mesh."""
    meshes = unique(row["mesh"] for row in rows)
    figure, parts = panels(rows, theme)
    for axes, chosen in parts:
        known = [row for row in chosen if row["total_bytes"] is not None]
        for key in unique(map(_setting, known)):
            alike = [row for row in known if _setting(row) == key]
            smallest = min(row["chips"] for row in alike)
            alike = sorted(
                (row for row in alike if row["chips"] == smallest), key=lambda row: row["batch"]
            )
            mesh = meshes.index(key[1])
            x, y = [row["batch"] for row in alike], [row["total_bytes"] / 2**30 for row in alike]
            axes.plot(_beside(x, mesh), y, **line_style(key[0], mesh, theme))
        for chip in unique(map(chip_of, known)):
            limit = next(row["limit_bytes"] for row in known if chip_of(row) == chip)
            color = line_style(chip, 0, theme)["color"]
            axes.axhline(limit / 2**30, color=color, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylim(bottom=2 ** math.floor(math.log2(0.9 * axes.dataLim.y0)))  # a labeled line
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.grid(True)
    outer_labels(figure, "images of a chip", "GiB of a chip")
    limit = Line2D([], [], color=theme.muted, linestyle=":", label="limit of the chip")
    legend(figure, rows, meshes, theme, [limit])
    return figure


def _beside(x, mesh: int) -> list[float]:
    """Shifts the points of a mesh so that they do not hide those of another."""
    return [value * 1.06**mesh for value in x]


def _setting(row) -> tuple:
    return chip_of(row), *(row[name] for name in ("mesh", "remat", "attention", "scan", "dtype"))


def split(rows, theme: Theme) -> Figure:
    """Draws the three bounds on the step time per slice; the rightmost is the estimate."""
    most = max(len(_split_rows(chosen)) for chosen in grouped(rows).values())
    figure, parts = panels(rows, theme, height=0.6 + 0.19 * most, sharex=False)
    for axes, chosen in parts:
        found = _split_rows(chosen)
        for place, row in enumerate(found):
            values = [1e3 * row[f"estimate_{term}_seconds"] for term in _TERMS]
            axes.plot(
                [min(v for v in values if v > 0), max(values)],
                [place, place],
                color=theme.line,
                linewidth=2,
                zorder=1,
            )
            for value, mark, color in zip(values, _MARKERS, theme.series, strict=False):
                if value > 0:
                    axes.plot(value, place, **marker_style(mark, color, theme))
        axes.set_yticks(range(len(found)), _split_names(found))
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.grid(axis="x")
    outer_labels(figure, "ms of a step, at least (estimate)", "")
    handles = [
        Line2D([], [], linestyle="none", label=name, **marker_style(mark, color, theme))
        for name, mark, color in zip(_TERMS.values(), _MARKERS, theme.series, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def _split_rows(rows) -> list[dict]:
    return [row for line in _longest(rows) for row in line]


def _split_names(rows) -> list[str]:
    """Names the slice of each row, with mesh and batch per chip where they differ."""
    names = [row["slice"] for row in rows]
    for field, text in (("mesh", "{}"), ("batch", "batch {}")):
        if len(unique(row[field] for row in rows)) > 1:
            details = (text.format(row[field]) for row in rows)
            names = [f"{name}, {more}" for name, more in zip(names, details, strict=True)]
    return names


def measured(rows, theme: Theme) -> Figure:
    """Draws images per second, efficiency and memory against devices, weak and strong scaling."""
    figure = new_figure(9.9, 3.9, theme)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    speed, share, memory_axes = figure.subplots(1, 3)
    lines = MEASURED.series(rows)
    names = [_measured_name(line[0]) for line in lines]
    for line in lines:
        what, scaling = _measured_name(line[0]), line[0]["scaling"]
        color = theme.series[unique(names).index(what) % len(theme.series)]
        style = dict(
            color=color,
            linestyle="-" if scaling == "weak" else DASHES[1],
            marker="o" if scaling == "weak" else "s",
            markersize=5,
            linewidth=1.8,
            label=f"{what}, {scaling}",
        )
        x = [row["devices"] for row in line]
        y = [row["images_per_second"] for row in line]
        ends = [[], []]  # quartiles of the time: the longer one is the lower rate
        for row in line:
            rate = row["images_per_second"] * row["median_seconds"]
            ends[0].append(row["images_per_second"] - rate / row["third_quartile_seconds"])
            ends[1].append(rate / row["first_quartile_seconds"] - row["images_per_second"])
        speed.errorbar(x, y, yerr=ends, capsize=3, elinewidth=1, **style)
        speed.plot(
            [x[0], x[-1]],
            [y[0], y[0] * x[-1] / x[0]],
            color=theme.muted,
            linewidth=0.9,
            linestyle=":",
        )
        share.plot(x, [row["efficiency"] for row in line], **style)
        if all(row["peak_bytes"] is not None for row in line):
            memory_axes.plot(x, [row["peak_bytes"] / 2**30 for row in line], **style)
    speed.set(ylabel="images/s", yscale="log")
    share.set(ylabel="efficiency", ylim=(0, 1.1 * max([1, *(row["efficiency"] for row in rows)])))
    memory_axes.set(ylabel="GiB of a device (peak)", ylim=(0, None))
    for axes in (speed, share, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["devices"] for row in rows}))
        plain_numbers(axes.xaxis)
        axes.set_xlabel("devices")
        axes.grid(True)
    plain_numbers(speed.yaxis, decades=True)
    handles, labels = share.get_legend_handles_labels()
    handles.append(Line2D([], [], color=theme.muted, linestyle=":"))
    figure.legend(handles, [*labels, "ideal"], loc="outside upper left", ncols=3, handlelength=3)
    notes = unique(row["note"].partition(":")[0] for row in rows if row["note"])
    if notes:
        figure.supxlabel(
            "Simulation: the devices share the cores of one machine; says nothing about speed-up.",
            fontsize=9,
            color=theme.series[1],
        )
    return figure


def _measured_name(row) -> str:
    words = [row["encoder"], f"{row['image_size']} px", row["mesh"]]
    return " ".join(words + [row["remat"]] * (row["remat"] != "none"))


CHARTS = {
    "measured": {"measured": (measured, "Scaling on local devices")},
    "compiled": {
        "compiled_throughput": (throughput, "Estimated throughput"),
        "compiled_efficiency": (efficiency, "Estimated efficiency"),
        "compiled_memory": (memory, "Memory of a chip"),
        "compiled_split": (split, "What a step needs at least"),
    },
}
