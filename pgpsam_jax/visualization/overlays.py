"""Overlays of good and bad slices, and contact sheets of predictions.

Volumes are `(D, H, W)` in display orientation: row 0 anterior, column 0 the patient's right.
Figures use matplotlib's object interface (no display, no global state) and are written atomically.
"""

import glob
import math
import re
from pathlib import Path

import numpy as np
from matplotlib import patheffects
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pgpsam_jax.data.io.voxel_grid import AXES, AXIAL
from pgpsam_jax.data.layouts.cases import safe_case_id
from pgpsam_jax.metrics.overlap import slice_dice
from pgpsam_jax.utils.untrusted_text import sanitize
from pgpsam_jax.visualization.theme import save_png

# Okabe and Ito's color-blind-safe set, with violet in place of black: eight colors that stand out
# from the grays of CT. Neighboring organs get dissimilar ones.
_CYCLE = ("#CC79A7", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#F0E442", "#D55E00", "#9933FF")
_ORGANS = "spleen right_kidney left_kidney gallbladder liver stomach aorta pancreas".split()
_VENTRICLES = "left_ventricle right_ventricle third_ventricle fourth_ventricle".split()
_KNOWN = dict(zip(_ORGANS, _CYCLE, strict=True)) | dict(
    zip(_VENTRICLES, (_CYCLE[2], _CYCLE[1], _CYCLE[0], _CYCLE[3]), strict=True)
)
_OUTLINE = [patheffects.withStroke(linewidth=2, foreground="black")]
_GAP = 0.08  # inches between panels
_MARGIN = 0.15
_LONGEST = 4.0  # largest ratio of the sides of a panel; beyond it the slice is not to scale
_FINEST = 1024  # voxels drawn along a side, more than there are pixels
_OTHER_SIDE = dict(zip("LRAPSI", "RLPAIS", strict=True))


def palette(names) -> dict[str, str]:
    """Hex colors of all classes but the background; known organs always have the same color.

    names: K class names, background first. Unknown names take the remaining colors in order of
    class id, then lighter and darker versions of all eight.
    """
    colors = {name: _KNOWN[_plain(name)] for name in names[1:] if _plain(name) in _KNOWN}
    rounds = [*_CYCLE, *(_mix(c, 1.0, 0.55) for c in _CYCLE), *(_mix(c, 0.0, 0.4) for c in _CYCLE)]
    free = [color for color in rounds if color not in colors.values()]
    others = [name for name in names[1:] if name not in colors]
    colors |= {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: colors[name] for name in names[1:]}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower()).replace("lateral_", "")


def _mix(color, level: float, share: float) -> str:
    red, green, blue = ((1 - share) * part + share * level for part in to_rgb(color))
    return to_hex((red, green, blue)).upper()


def overlay_slice(
    image, truth, prediction, spacing, names, title: str, directions: str = AXES[AXIAL]
) -> Figure:
    """Figure of one slice: image | ground truth | prediction, with the slice's Dice per organ.

    Args:
        image: (H, W) in [0, 1].
        truth, prediction: class ids (H, W), or None for no panel.
        spacing: mm along (H, W).
        names: K class names, background first.
        title: of the figure.
        directions: `SourceGrid.directions` of the volume.
    """
    title += scale_note(image.shape, spacing)
    spacing = display_spacing(image.shape, spacing)
    maps = {"ground truth": truth, "prediction": prediction}
    maps = {what: labels for what, labels in maps.items() if labels is not None}
    legend = present(names, *maps.values())
    if len(maps) == 2:
        scores = slice_dice(prediction[None], truth[None], len(names))[0]
        legend = {k: f"{name}  {scores[k - 1]:.2f}" for k, name in legend.items()}
    layout, ratio = (1, 1 + len(maps)), _ratio(image.shape, spacing)
    figure, axes = panels(layout, ratio, 3.6, legend, names, title, head=0.22)
    for ax, (what, labels) in zip(axes, {"image": None, **maps}.items(), strict=True):
        draw_slice(ax, image, labels, spacing, names, directions)
        ax.set_title(what, fontsize=10, pad=4)
    return figure


def write_overlays(
    image, truth, prediction, spacing, names, case_id, out_dir, region=None, *, directions
) -> list[Path]:
    """Writes overlays of the worst, median and best slice with organs; replaces earlier ones.

    Slices are ranked by mean Dice over the organs in either map; ties are broken by organ area, so
    that a failure on a large organ precedes one on its last voxels.

    Args:
        image: (D, H, W) in [0, 1].
        truth, prediction: class ids (D, H, W).
        spacing: mm along (D, H, W).
        names: K class names, background first.
        case_id: of the case, for titles and file names.
        out_dir: folder of the overlays.
        region: boolean (D,), the slices to choose from; None for all.
        directions: `SourceGrid.directions` of the volume.

    Returns:
        The paths, named by case, kind, slice and Dice.
    """
    scores = slice_dice(prediction, truth, len(names))
    bearing = np.isfinite(scores).any(axis=1) & (True if region is None else region)
    chosen = _worst_median_best(scores, bearing, truth, prediction)
    out_dir, stem = Path(out_dir), safe_case_id(str(case_id))
    if out_dir.is_dir():
        for kind in ("worst", "median", "best"):
            for old in out_dir.glob(f"{glob.escape(stem)}_{kind}_z*_dice*.png"):
                old.unlink()
    paths = []
    for kind, z in chosen.items():
        mean = np.nanmean(scores[z])
        title = f"{case_id}, {kind} slice: z = {z} (0 to {len(truth) - 1}), Dice {mean:.2f}"
        maps = image[z], truth[z], prediction[z]
        figure = overlay_slice(*maps, spacing[1:], names, title, directions)
        paths.append(save_png(figure, out_dir / f"{stem}_{kind}_z{z}_dice{mean:.2f}.png"))
    return paths


def _worst_median_best(scores, bearing, truth, prediction) -> dict[str, int]:
    """{"worst", "median", "best": slice index}; fewer if there are fewer than three slices."""
    slices = np.flatnonzero(bearing)
    if not slices.size:
        return {}
    mean = np.nanmean(scores[slices], axis=1)
    area = np.count_nonzero((truth > 0) | (prediction > 0), axis=(1, 2))[slices]
    rising, n = slices[np.lexsort((-area, mean))], len(slices)
    picks = {"best": int(slices[np.lexsort((area, mean))][-1])}
    if n > 1:
        picks["worst"] = int(rising[0])
    middle = int(rising[n // 2])
    return picks if middle in picks.values() else picks | {"median": middle}


def write_preview(image, prediction, spacing, names, path, *, directions: str) -> Path:
    """Writes a contact sheet of a prediction: up to 12 evenly spaced slices with organs.

    If no organ was found, the sheet shows slices of the whole volume, and its title says so.

    Args:
        image: (D, H, W) in [0, 1].
        prediction: class ids (D, H, W).
        spacing: mm along (D, H, W).
        names: K class names, background first.
        path: of the PNG.
        directions: `SourceGrid.directions` of the volume.
    """
    path = Path(path)
    organs = np.flatnonzero((prediction > 0).any(axis=(1, 2)))
    pool = organs if organs.size else np.arange(len(prediction))
    chosen = pool[evenly_spaced(len(pool), 12)]
    title = path.name.removesuffix(path.suffix) + ("" if organs.size else ": no organ found")
    title += scale_note(image.shape[1:], spacing[1:])
    spacing = display_spacing(image.shape[1:], spacing[1:])
    columns = min(4, len(chosen))
    layout, ratio = (math.ceil(len(chosen) / columns), columns), _ratio(image.shape[1:], spacing)
    legend = present(names, prediction[chosen])
    figure, axes = panels(layout, ratio, 2.7, legend, names, title)
    for ax, z in zip(axes, chosen, strict=False):
        draw_slice(ax, image[z], prediction[z], spacing, names, directions)
        write_on(ax, 0.98, 0.98, f"z = {z}", ha="right", va="top")
    for ax in axes[len(chosen) :]:
        ax.set_visible(False)
    return save_png(figure, path)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Up to `most` of the indices 0 to count - 1, ends included."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def display_spacing(shape, spacing) -> tuple[float, float]:
    """The spacing, enlarged along the shorter side if the slice is too narrow to draw to scale.

    shape: (H, W); spacing: mm along (H, W).
    """
    sides = [count * mm for count, mm in zip(shape, spacing, strict=True)]
    least = max(sides) / _LONGEST
    return tuple(max(side, least) / count for side, count in zip(sides, shape, strict=True))


def scale_note(shape, spacing) -> str:
    """Suffix of the title if `display_spacing` is not the true spacing."""
    displayed = display_spacing(shape, spacing)
    return "" if np.allclose(displayed, spacing) else " (not to scale)"


def present(names, *maps) -> dict[int, str]:
    """{class id: name} of the classes in any of the maps, without the background."""
    ids = set().union(*(np.unique(labels).tolist() for labels in maps))
    return {k: names[k] for k in range(1, len(names)) if k in ids}


def _ratio(shape, spacing) -> float:
    """Height by width of a slice (H, W)."""
    return (shape[0] * spacing[0]) / (shape[1] * spacing[1])


def panels(layout, ratio: float, width: float, legend, names, title="", head=0.0, top=0.35):
    """Figure of panels with a title and a legend below.

    Args:
        layout: (rows, columns).
        ratio: height by width of a panel, limited to a readable one.
        width: inches of a panel.
        legend: {class id: text}.
        names: K class names, background first.
        title: of the figure; "" for none.
        head: inches above each row for panel titles.
        top: inches above all rows.

    Returns:
        The figure and its axes, row by row.
    """
    rows, columns = layout
    height = width * min(max(ratio, 1 / _LONGEST), _LONGEST)
    total = columns * width + (columns - 1) * _GAP + 2 * _MARGIN
    across = max(1, int(total / (0.7 + 0.085 * max(map(len, legend.values()), default=1))))
    bottom = _MARGIN + 0.05 + 0.215 * math.ceil(len(legend) / across)
    tall = bottom + rows * (height + head + _GAP) + top
    figure, axes = Figure(figsize=(total, tall)), []
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        low = bottom + (rows - 1 - row) * (height + head + _GAP)
        left = _MARGIN + column * (width + _GAP)
        axes.append(figure.add_axes((left / total, low / tall, width / total, height / tall)))
    # A long case name must not run off a narrow sheet.
    size = min(12, 120 * total / max(1, len(title)))
    style = {"ha": "center", "va": "center", "fontsize": size, "parse_math": False}
    figure.text(0.5, 1 - 0.2 / tall, sanitize(title, 1000), **style)
    colors = palette(names)
    handles = [
        Patch(color=colors[names[k]], label=text.replace("_", " ")) for k, text in legend.items()
    ]
    style = {"frameon": False, "handlelength": 1.2, "columnspacing": 1.4, "borderaxespad": 0.2}
    if handles:
        columns = min(across, len(handles))
        below = figure.legend(handles=handles, ncols=columns, loc="lower center", **style)
        for text in below.get_texts():  # a name may hold dollar signs
            text.set_parse_math(False)
    return figure, axes


def draw_slice(ax, image, labels, spacing, names, directions: str | None) -> None:
    """Draws a slice in mm with the organs of `labels` and the letters of the body's sides.

    image: (H, W) in [0, 1]; labels: class ids (H, W) or None; spacing: mm along (H, W);
    directions: `SourceGrid.directions` of the volume, None for no letters.
    """
    height, width = (n * s for n, s in zip(image.shape, spacing, strict=True))
    thin = tuple(slice(None, None, -(-n // _FINEST)) for n in image.shape)
    image, labels = image[thin], labels if labels is None else labels[thin]
    spacing = height / image.shape[0], width / image.shape[1]
    ax.imshow(
        image, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="bilinear"
    )
    colors = palette(names)
    if labels is not None:
        for k in present(names, labels):
            draw_outline(ax, labels == k, spacing, colors[names[k]], 1.1, fill=0.3)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if directions:
        down, right = directions[1], directions[2]
        places = (0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04)
        letters = _OTHER_SIDE[right], right, _OTHER_SIDE[down], down
        for place, letter in zip(places, letters, strict=True):
            write_on(ax, *place, letter, size=9)


def draw_outline(ax, mask, spacing, color, width: float, fill: float = 0.0) -> None:
    """Draws the contour of a mask (H, W), filled with opacity `fill`; spacing: mm along (H, W)."""
    # The rim of zeros closes the contour of an organ at the border.
    mask = np.pad(mask, 1).astype(np.float32)
    y, x = ((np.arange(n) - 0.5) * s for n, s in zip(mask.shape, spacing, strict=True))
    if fill:
        ax.contourf(x, y, mask, levels=[0.5, 1.5], colors=[color], alpha=fill)
    ax.contour(x, y, mask, levels=[0.5], colors=[color], linewidths=width)


def write_on(ax, x, y, text, ha="center", va="center", size=8) -> None:
    """Writes at (x, y) of [0, 1]^2 of a panel, readable on any gray: white with black outline."""
    style = {"color": "white", "fontsize": size, "path_effects": _OUTLINE}
    ax.text(x, y, text, transform=ax.transAxes, ha=ha, va=va, **style)
