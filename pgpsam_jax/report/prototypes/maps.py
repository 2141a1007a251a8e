"""Maps on the token grid over slices of CT: dense prompts and attention weights."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from pgpsam_jax.report.prototypes.collect import Look, Slice
from pgpsam_jax.visualization import overlays

_WIDE = 9.2  # inches of a full-width figure
_AIR = 0.1  # of the window: below it is no body
_GLOW = LinearSegmentedColormap.from_list(
    "glow", [(0.0, "#00000000"), (0.25, "#D55E00B0"), (0.6, "#E69F00F0"), (1.0, "#FFFFC8FF")]
)


def dense_figure(look: Look, table: dict):
    """Rows: slices. Columns: CT with the organs, then norm and colors of D for every pass.

    table: the columns of `prototype_dense.csv`.
    """
    passes = range(len(look.passes))
    labels = np.stack([look.slices[i].truth for i in look.shown])
    titles = ["image, organs"]
    for number in passes:
        titles += [f"pass {number}\nsize of D", f"pass {number}\ncontent of D"]
    frames = [_body(look.slices[index]) for index in look.shown]
    figure, axes = _sheet(frames, titles, look.names, overlays.present(look.names, labels))
    for line, (index, frame) in enumerate(zip(look.shown, frames, strict=True)):
        part, here = look.slices[index], axes[line * len(titles) : (line + 1) * len(titles)]
        _base(here[0], part, look.names, frame, part.truth)
        _corner(here[0], f"{part.case}\nz = {part.z}")
        for number in passes:
            norm, parts = _dense_maps(table, part, number)
            of_pass = table["norm"][table["pass"] == number]
            levels = {"cmap": "viridis", "vmin": of_pass.min(), "vmax": of_pass.max()}
            for ax, image, style in zip(
                here[1 + 2 * number :], (norm, parts), (levels, {}), strict=False
            ):
                _base(ax, part, look.names, frame)
                _overlay(ax, part, image, interpolation="bilinear", **style)
                _outline(ax, part, range(1, len(look.names)), look.names)
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


def attention_figure(look: Look, table: dict, shares: dict, name: str):
    """Rows: slices and stages. Columns: classes. Each map is scaled to its own maximum.

    table, shares: the columns of `prototype_attention.csv` and `prototype_shares.csv`; name: the
    map to draw, W_c or W_q.
    """
    titles = [label.replace("_", " ").replace(" ", "\n", 1) for label in look.names]
    places = [(look.slices[index], number) for index in look.shown for number in look.stages]
    frames = [_input_frame(part) for part, _ in places]
    figure, axes = _sheet(frames, titles, look.names)
    for line, (part, number) in enumerate(places):
        for k, label in enumerate(look.names):
            ax = axes[line * len(titles) + k]
            _base(ax, part, look.names, frames[line])
            weights = _rows_of(table, part, number, name, label)
            _overlay(ax, part, weights / weights.max(), interpolation="nearest", cmap=_GLOW)
            if k and (part.truth == k).any():
                _outline(ax, part, [k], look.names)
                row = _where(shares, part, number, name, label)
                _corner(ax, f"{100 * shares['attention'][row][0]:.0f} %", right=True)
        _corner(axes[line * len(titles)], f"{part.case}\nz = {part.z}\nstage {number}")
    return figure


def _where(table, part: Slice, number: int, name: str, label: str):
    key = {"case": part.case, "z": part.z, "pass": number, "map": name, "class": label}
    return np.logical_and.reduce([table[column] == value for column, value in key.items()])


def _rows_of(table, part: Slice, number: int, name: str, label: str) -> np.ndarray:
    """A map (h, w) of the attention table."""
    own = _where(table, part, number, name, label)
    columns = sorted(
        (c for c in table if c[0] == "c" and c[1:].isdigit()), key=lambda c: int(c[1:])
    )
    return np.stack([table[column][own] for column in columns], axis=1)


def _sheet(frames, titles, names, legend=()):
    """Figure and axes: a row of panels for every frame, a column for every title."""
    ratio = max((bottom - top) / (right - left) for left, right, bottom, top in frames)
    legend = {k: names[k] for k in legend}
    grid, width = (len(frames), len(titles)), min(2.3, _WIDE / len(titles))
    sizes = (ratio, 1.0), (1.0, 1.0), width
    figure, axes = overlays.panels(grid, *sizes, legend, names, "", head=0.0, top=0.3)
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, loc="center", fontsize=8, pad=4)
    return figure, axes


def _base(ax, part: Slice, names, frame, labels=None) -> None:
    """The slice in mm, in a frame of it; on black where that is not of the panel's shape."""
    overlays.draw_slice(ax, part.image, labels, part.spacing, names, letters=False)
    left, right, bottom, top = frame
    box, (wide, high) = ax.get_position(original=True), ax.figure.get_size_inches()
    ratio = box.height * high / (box.width * wide)
    x = max(0.0, ((bottom - top) / ratio - (right - left)) / 2)
    y = max(0.0, ((right - left) * ratio - (bottom - top)) / 2)
    ax.set(xlim=(left - x, right + x), ylim=(bottom + y, top - y), facecolor="black")


def _input_frame(part: Slice) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in mm of the network's input, padding and all."""
    fit, (rows, columns) = part.fit, part.image.shape
    down, across = part.spacing[0] * rows / fit.height, part.spacing[1] * columns / fit.width
    left, top = -fit.left * across, -fit.top * down
    return left, left + fit.size * across, top + fit.size * down, top


def _body(part: Slice) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in mm of what is not air, with a small rim."""
    keep = (part.image > _AIR) | (part.truth > 0)
    ends = []
    for axis, mm in zip((1, 0), part.spacing, strict=True):
        inside = (
            np.flatnonzero(keep.any(axis=axis)) if keep.any() else np.arange(keep.shape[1 - axis])
        )
        ends.append(((inside[0] - 1) * mm, (inside[-1] + 2) * mm))
    (top, bottom), (left, right) = ends
    return left, right, bottom, top


def _overlay(ax, part: Slice, image, **style) -> None:
    """A map of the token grid where it lies on the slice."""
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(image, extent=_input_frame(part), aspect="auto", **style)
    ax.set(xlim=limits[0], ylim=limits[1])


def _outline(ax, part: Slice, classes, names) -> None:
    colors = overlays.palette(names)
    for k in classes:
        mask = np.pad(part.truth == k, 1).astype(np.float32)
        if mask.any():
            y, x = ((np.arange(n) - 0.5) * s for n, s in zip(mask.shape, part.spacing, strict=True))
            ax.contour(x, y, mask, levels=[0.5], colors=[colors[names[k]]], linewidths=0.9)


def _corner(ax, text: str, right: bool = False) -> None:
    side = {"transform": ax.transAxes, "ha": "right" if right else "left", "va": "top"}
    ax.text(0.97 if right else 0.03, 0.97, text, **side, **overlays.note(7.5))
