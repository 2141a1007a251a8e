"""The charts of a study: each draws the rows of one CSV file in the colours of a theme."""

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from experiments.scaling.csv_table import COMPILED, MEASURED, series
from pgpsam_jax.report.figures.theme import Theme, new_figure

_CHIPS = ("v4", "v5e", "v5p", "v6e")  # in order of the theme's colours
_DASHES = ("-", (0, (5, 1.5)), (0, (2, 1)), (0, (4, 1, 1, 1)))
_FILLS = ("full", "none", "left", "top")  # of markers, by mesh like the dashes: a point has no line
_TERMS = {"compute": "compute", "hbm": "memory (HBM)", "ici": "network (ICI)"}
_MARKERS = "osD"


def throughput(rows, theme: Theme) -> Figure:
    """Estimated images per second against chips, and what perfect scaling would give."""
    return _against_chips(
        rows, theme, "estimate_images_per_second", "images/s (estimate)", ideal=True
    )


def efficiency(rows, theme: Theme) -> Figure:
    """Estimated images per second and chip, over those of the smallest slice."""
    return _against_chips(rows, theme, "estimate_efficiency", "efficiency (estimate)")


def _against_chips(rows, theme, column, label, ideal=False) -> Figure:
    meshes = _unique(row["mesh"] for row in rows)
    figure, panels = _panels(rows, theme)
    for axes, chosen in panels:
        for line in _longest(chosen):
            first = line[0]
            x, y = [row["chips"] for row in line], [row[column] for row in line]
            mesh = meshes.index(first["mesh"])
            axes.plot(_beside(x, mesh), y, **_style(_chip(first), mesh, theme))
            if ideal and len(line) > 1:
                ends = [y[0], y[0] * x[-1] / x[0]]
                axes.plot([x[0], x[-1]], ends, color=theme.muted, linewidth=0.9, linestyle=":")
        axes.set_xscale("log", base=2)
        _plain(axes.xaxis)
        axes.grid(True)
        if ideal:
            axes.set_yscale("log")
            _plain(axes.yaxis, decades=True)
        else:
            axes.set_ylim(0, 1.08 * max([1.0, *(line.get_ydata().max() for line in axes.lines)]))
    _outer(figure, "chips", label)
    extra = [Line2D([], [], color=theme.muted, linestyle=":", label="ideal")] if ideal else []
    _legend(figure, rows, meshes, theme, extra)
    return figure


def _longest(rows) -> list[list[dict]]:
    """For every chip and mesh the series over most slices, then with the largest batch."""
    found = {}
    for line in series(COMPILED, rows):
        key = _chip(line[0]), line[0]["mesh"]
        size = len(line), line[0]["batch"]
        if key not in found or size > found[key][0]:
            found[key] = size, line
    return [line for _, line in found.values()]


def memory(rows, theme: Theme) -> Figure:
    """Bytes of a chip against its batch, on the smallest slice of each chip and mesh."""
    meshes = _unique(row["mesh"] for row in rows)
    figure, panels = _panels(rows, theme)
    for axes, chosen in panels:
        known = [row for row in chosen if row["total_bytes"] is not None]
        for key in _unique(map(_setting, known)):
            alike = [row for row in known if _setting(row) == key]
            smallest = min(row["chips"] for row in alike)
            alike = sorted(
                (row for row in alike if row["chips"] == smallest), key=lambda row: row["batch"]
            )
            mesh = meshes.index(key[1])
            x, y = [row["batch"] for row in alike], [row["total_bytes"] / 2**30 for row in alike]
            axes.plot(_beside(x, mesh), y, **_style(key[0], mesh, theme))
        for chip in _unique(map(_chip, known)):
            limit = next(row["limit_bytes"] for row in known if _chip(row) == chip)
            colour = _style(chip, 0, theme)["color"]
            axes.axhline(limit / 2**30, color=colour, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylim(bottom=2 ** math.floor(math.log2(0.9 * axes.dataLim.y0)))  # a labelled line
        _plain(axes.xaxis)
        _plain(axes.yaxis)
        axes.grid(True)
    _outer(figure, "images of a chip", "GiB of a chip")
    limit = Line2D([], [], color=theme.muted, linestyle=":", label="limit of the chip")
    _legend(figure, rows, meshes, theme, [limit])
    return figure


def _beside(x, mesh: int) -> list[float]:
    """Places of a mesh's points, so that those of another with the same value can be seen."""
    return [value * 1.06**mesh for value in x]


def _setting(row) -> tuple:
    return _chip(row), *(row[name] for name in ("mesh", "remat", "attention", "scan", "dtype"))


def split(rows, theme: Theme) -> Figure:
    """The three bounds on the time of a step for each slice; the rightmost is the estimate."""
    lanes = max(len(_split_lanes(chosen)) for chosen in _grouped(rows).values())
    figure, panels = _panels(rows, theme, height=0.6 + 0.19 * lanes, sharex=False)
    for axes, chosen in panels:
        found = _split_lanes(chosen)
        for place, row in enumerate(found):
            values = [1e3 * row[f"estimate_{term}_seconds"] for term in _TERMS]
            axes.plot(
                [min(v for v in values if v > 0), max(values)],
                [place, place],
                color=theme.line,
                linewidth=2,
                zorder=1,
            )
            for value, mark, colour in zip(values, _MARKERS, theme.series, strict=False):
                if value > 0:
                    axes.plot(value, place, **_mark(mark, colour, theme))
        axes.set_yticks(range(len(found)), _split_names(found))
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xscale("log")
        _plain(axes.xaxis)
        axes.grid(axis="x")
    _outer(figure, "ms of a step, at least (estimate)", "")
    handles = [
        Line2D([], [], linestyle="none", label=name, **_mark(mark, colour, theme))
        for name, mark, colour in zip(_TERMS.values(), _MARKERS, theme.series, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def _split_lanes(rows) -> list[dict]:
    return [row for line in _longest(rows) for row in line]


def _split_names(rows) -> list[str]:
    """The slice of each row, with mesh and the batch of a chip where they differ."""
    names = [row["slice"] for row in rows]
    for field, text in (("mesh", "{}"), ("batch", "batch {}")):
        if len(_unique(row[field] for row in rows)) > 1:
            told = (text.format(row[field]) for row in rows)
            names = [f"{name}, {more}" for name, more in zip(names, told, strict=True)]
    return names


def measured(rows, theme: Theme) -> Figure:
    """Images per second, efficiency and memory against devices, weak and strong scaling."""
    figure = new_figure(9.9, 3.9, theme)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    speed, share, memory_axes = figure.subplots(1, 3)
    lines = series(MEASURED, rows)
    names = [_measured_name(line[0]) for line in lines]
    for line in lines:
        what, scaling = _measured_name(line[0]), line[0]["scaling"]
        colour = theme.series[_unique(names).index(what) % len(theme.series)]
        style = dict(
            color=colour,
            linestyle="-" if scaling == "weak" else _DASHES[1],
            marker="o" if scaling == "weak" else "s",
            markersize=5,
            linewidth=1.8,
            label=f"{what}, {scaling}",
        )
        x = [row["devices"] for row in line]
        y = [row["images_per_second"] for row in line]
        ends = [[], []]  # quartiles of the time, so that the longer one is the lower rate
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
        _plain(axes.xaxis)
        axes.set_xlabel("devices")
        axes.grid(True)
    _plain(speed.yaxis, decades=True)
    handles, labels = share.get_legend_handles_labels()
    handles.append(Line2D([], [], color=theme.muted, linestyle=":"))
    figure.legend(handles, [*labels, "ideal"], loc="outside upper left", ncols=3, handlelength=3)
    notes = _unique(row["note"].partition(":")[0] for row in rows if row["note"])
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


def _grouped(rows) -> dict[tuple, list[dict]]:
    """Rows by (encoder, image size): the panels of a figure."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["encoder"], row["image_size"]), []).append(row)
    return {key: found[key] for key in sorted(found, key=lambda k: _unique(found).index(k))}


def _panels(rows, theme, height: float = 2.5, sharex: bool = True):
    """(figure, [(axes, its rows)]): a line of panels per encoder, a column per image size."""
    groups = _grouped(rows)
    encoders, sizes = _unique(key[0] for key in groups), sorted({key[1] for key in groups})
    width = 9.9 if len(sizes) > 1 else 6.4
    figure = new_figure(width, 0.7 + height * len(encoders), theme)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    axes = figure.subplots(len(encoders), len(sizes), squeeze=False, sharex=sharex, sharey=False)
    panels = []
    for i, encoder in enumerate(encoders):
        for j, size in enumerate(sizes):
            chosen = groups.get((encoder, size), [])
            axes[i, j].set_visible(bool(chosen))
            axes[i, j].set_title(f"{encoder}, {size} px")
            if chosen:
                panels.append((axes[i, j], chosen))
    return figure, panels


def _chip(row) -> str:
    return row["topology"].split(":")[0]


def _style(chip: str, mesh: int, theme: Theme) -> dict:
    """Colour and marker by chip, dashes and filling by mesh."""
    place = _CHIPS.index(chip) if chip in _CHIPS else len(_CHIPS)
    return {
        "color": theme.series[place],
        "marker": "osD^v"[place],
        "markersize": 4.5,
        "linewidth": 1.6,
        "linestyle": _DASHES[mesh % len(_DASHES)],
        "fillstyle": _FILLS[mesh % len(_FILLS)],
    }


def _mark(mark: str, colour: str, theme: Theme) -> dict:
    return {
        "marker": mark,
        "markersize": 6,
        "color": colour,
        "markeredgecolor": theme.rim,
        "markeredgewidth": 0.5,
        "zorder": 3,
    }


def _legend(figure, rows, meshes, theme, extra) -> None:
    chips = _unique(map(_chip, rows))
    handles = [Line2D([], [], label=chip, **_style(chip, 0, theme)) for chip in sorted(chips)]
    if len(meshes) > 1:
        handles += [
            Line2D(
                [], [], label=mesh, **_style("", i, theme) | {"color": theme.text, "marker": "o"}
            )
            for i, mesh in enumerate(meshes)
        ]
    figure.legend(
        handles=[*handles, *extra], loc="outside upper left", ncols=min(8, len(handles) + 1)
    )


def _outer(figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9.5)
    figure.supylabel(y, fontsize=9.5)


def _plain(axis, decades: bool = False) -> None:
    """Numbers as they are, not as powers; `decades`: with 1, 2 and 5 of each power of ten."""
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    axis.set_minor_formatter(NullFormatter())
    if decades:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())


def _unique(values) -> list:
    return list(dict.fromkeys(values))


CHARTS = {
    "measured": {"measured": (measured, "Scaling on the devices at hand")},
    "compiled": {
        "compiled_throughput": (throughput, "Estimated throughput"),
        "compiled_efficiency": (efficiency, "Estimated efficiency"),
        "compiled_memory": (memory, "Memory of a chip"),
        "compiled_split": (split, "What a step needs at least"),
    },
}
