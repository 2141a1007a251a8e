"""CT slices as panels of a figure: cropped to the body, drawn on black."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from pgpsam_jax.visualization.overlays import display_spacing, draw_slice, write_on

_AIR = 0.1  # share of the window; darker pixels are no body


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """Slice `z` of a case.

    image: (H, W) in [0, 1]; truth, predictions: class ids (H, W); spacing: mm along (H, W), as
    drawn.
    """

    case: str
    z: int
    image: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, float]
    predictions: Sequence[np.ndarray] = ()
    directions: str | None = None  # `SourceGrid.directions`; None for no letters

    @property
    def key(self) -> dict:
        """The columns of a CSV file that name the slice."""
        return {"case": self.case, "z": self.z}

    @property
    def frame(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top in mm."""
        height, width = (n * mm for n, mm in zip(self.image.shape, self.spacing, strict=True))
        return 0.0, width, height, 0.0

    @property
    def body_frame(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top in mm of the body."""
        rows, columns = body_box(self.image, self.truth)
        down, across = self.spacing
        return columns.start * across, columns.stop * across, rows.stop * down, rows.start * down

    def cropped(self) -> "Slice":
        """The slice cut to the body, its organs and its predictions."""
        box = body_box(self.image, self.truth, *self.predictions)
        return dataclasses.replace(
            self,
            image=self.image[box],
            truth=self.truth[box],
            spacing=display_spacing(self.image[box].shape, self.spacing),
            predictions=[labels[box] for labels in self.predictions],
        )


def body_box(image, *labels) -> tuple[slice, slice]:
    """Rows and columns of the largest body in an image (H, W) and of all labels, with a rim."""
    parts, count = ndimage.label(image > _AIR)
    sizes = np.bincount(parts.ravel())[1:]
    keep = parts == 1 + sizes.argmax() if count else np.ones(image.shape, bool)
    for ids in labels:
        keep = keep | (ids > 0)
    rows, columns = (_extent(keep.any(axis=axis)) for axis in (1, 0))
    return rows, columns


def _extent(keep) -> slice:
    """From the first to the last True of (L,), with a rim."""
    inside = np.flatnonzero(keep)
    rim = max(2, round(0.02 * len(inside)))
    return slice(max(0, int(inside[0]) - rim), min(len(keep), int(inside[-1]) + rim + 1))


def frame_ratio(frame) -> float:
    """Height by width of a frame (left, right, bottom, top)."""
    left, right, bottom, top = frame
    return (bottom - top) / (right - left)


def draw_panel(ax, part: Slice, labels, names, frame=None, letters: bool = False) -> None:
    """Draws a slice, or a frame of it in mm, on black where the panel has another shape."""
    draw_slice(ax, part.image, labels, part.spacing, names, part.directions if letters else None)
    left, right, bottom, top = frame or part.frame
    box, (wide, high) = ax.get_position(original=True), ax.figure.get_size_inches()
    ratio = box.height * high / (box.width * wide)
    x = max(0.0, ((bottom - top) / ratio - (right - left)) / 2)
    y = max(0.0, ((right - left) * ratio - (bottom - top)) / 2)
    ax.set(xlim=(left - x, right + x), ylim=(bottom + y, top - y), facecolor="black")


def corner_text(ax, text: str, right: bool = False, y: float = 0.97) -> None:
    """Writes in the upper left or right corner of a panel, down from y."""
    write_on(ax, 0.97 if right else 0.03, y, text, "right" if right else "left", "top")
