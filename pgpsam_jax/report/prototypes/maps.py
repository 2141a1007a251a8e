"""Maps on the token grid over CT slices: dense prompts and attention weights."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from pgpsam_jax.data.letterbox import Letterbox
from pgpsam_jax.report.figures.slice_panels import Slice, corner_text, draw_panel, frame_ratio
from pgpsam_jax.report.prototypes.collect import Probe
from pgpsam_jax.visualization import overlays

_WIDE = 9.2  # inches of a full-width figure
_GLOW = LinearSegmentedColormap.from_list(
    "glow", [(0.0, "#00000000"), (0.25, "#D55E00B0"), (0.6, "#E69F00F0"), (1.0, "#FFFFC8FF")]
)


def dense_figure(probe: Probe, table: dict):
    """Figure with slices as rows; CT with organs, then norm and content of D per pass as columns.

    table: the columns of `prototype_dense.csv`.
    """
    passes = range(len(probe.passes))
    labels = [probe.slices[i].truth for i in probe.examples]
    titles = ["image and\norgans"]
    for number in passes:
        titles += [f"pass {number}\nnorm of D", f"pass {number}\ncontent of D"]
    frames = [probe.slices[index].body_frame for index in probe.examples]
    figure, axes = _sheet(frames, titles, probe.names, overlays.present(probe.names, *labels))
    for line, (index, frame) in enumerate(zip(probe.examples, frames, strict=True)):
        part, here = probe.slices[index], axes[line * len(titles) : (line + 1) * len(titles)]
        draw_panel(here[0], part, part.truth, probe.names, frame)
        corner_text(here[0], f"{part.case}\nz = {part.z}")
        for number in passes:
            norm, parts = _dense_maps(table, part, number)
            of_pass = table["norm"][table["pass"] == number]
            levels = {"cmap": "viridis", "vmin": of_pass.min(), "vmax": of_pass.max()}
            extent = _input_frame(part, probe.image_size)
            for ax, image, style in zip(
                here[1 + 2 * number :], (norm, parts), (levels, {}), strict=False
            ):
                draw_panel(ax, part, None, probe.names, frame)
                _overlay(ax, extent, image, interpolation="bilinear", **style)
                _outline(ax, part, range(1, len(probe.names)), probe.names)
    return figure


def _dense_maps(table, part: Slice, number: int):
    """Norm (h, w), and three components (h, w, 3) scaled to [0, 1] over the pass."""
    of_pass = table["pass"] == number
    own = of_pass & (table["case"] == part.case) & (table["z"] == part.z)
    shape = int(table["row"][own].max()) + 1, int(table["column"][own].max()) + 1
    colors = []
    for key in ("pc1", "pc2", "pc3"):
        low, high = np.percentile(table[key][of_pass], (2, 98))
        scaled = (table[key][own] - low) / max(high - low, 1e-9)
        colors.append(scaled.clip(0, 1).reshape(shape))
    return table["norm"][own].reshape(shape), np.stack(colors, axis=-1)


def attention_figure(probe: Probe, table: dict, shares: dict, name: str):
    """Figure with slices and stages as rows, classes as columns; maps scaled to their maxima.

    table, shares: the columns of `prototype_attention.csv` and `prototype_shares.csv`; name: the
    map to draw, W_c or W_q.
    """
    titles = [label.replace("_", " ").replace(" ", "\n", 1) for label in probe.names]
    places = [(probe.slices[index], number) for index in probe.examples for number in probe.stages]
    frames = [_input_frame(part, probe.image_size) for part, _ in places]
    figure, axes = _sheet(frames, titles, probe.names, {})
    for line, (part, number) in enumerate(places):
        for k, label in enumerate(probe.names):
            ax = axes[line * len(titles) + k]
            draw_panel(ax, part, None, probe.names, frames[line])
            weights = _rows_of(table, part, number, name, label)
            _overlay(ax, frames[line], weights / weights.max(), interpolation="nearest", cmap=_GLOW)
            if k and (part.truth == k).any():
                _outline(ax, part, [k], probe.names)
                row = _where(shares, part, number, name, label)
                corner_text(ax, f"{100 * shares['attention'][row][0]:.0f} %", right=True)
        corner_text(axes[line * len(titles)], f"{part.case}\nz = {part.z}\nstage {number}")
    return figure


def _where(table, part: Slice, number: int, name: str, label: str):
    key = {"case": part.case, "z": part.z, "pass": number, "map": name, "class": label}
    return np.logical_and.reduce([table[column] == value for column, value in key.items()])


def _rows_of(table, part: Slice, number: int, name: str, label: str) -> np.ndarray:
    """A map (h, w) of the attention table."""
    own = _where(table, part, number, name, label)
    columns = (column for column in table if column[0] == "c" and column[1:].isdigit())
    return np.stack([table[c][own] for c in sorted(columns, key=lambda c: int(c[1:]))], axis=1)


def _sheet(frames, titles, names, legend):
    """Figure and axes with a row of panels per frame and a column per title."""
    ratio, width = max(map(frame_ratio, frames)), min(2.3, _WIDE / len(titles))
    figure, axes = overlays.panels((len(frames), len(titles)), ratio, width, legend, names, top=0.3)
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, loc="center", fontsize=8, pad=4)
    return figure, axes


def _input_frame(part: Slice, image_size: int) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in mm of the network's input, including the padding."""
    box, (rows, columns) = Letterbox.of(part.image.shape, image_size), part.image.shape
    down, across = part.spacing[0] * rows / box.height, part.spacing[1] * columns / box.width
    left, top = -box.left * across, -box.top * down
    return left, left + box.size * across, top + box.size * down, top


def _overlay(ax, frame, image, **style) -> None:
    """Draws a map of the token grid over its frame of the slice."""
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(image, extent=frame, aspect="auto", **style)
    ax.set(xlim=limits[0], ylim=limits[1])


def _outline(ax, part: Slice, classes, names) -> None:
    colors = overlays.palette(names)
    for k in classes:
        if (part.truth == k).any():
            overlays.draw_outline(ax, part.truth == k, part.spacing, colors[names[k]], 0.9)
