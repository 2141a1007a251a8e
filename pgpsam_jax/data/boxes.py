"""Boxes that prompt SAM for the labels of a volume, read from a table or drawn around its labels.

Letters: D slices, H rows, W columns of a volume in display orientation; K classes with background.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgpsam_jax.data.io.volume_files import stem_of
from pgpsam_jax.data.io.voxel_grid import SourceGrid
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import StrPath
from pgpsam_jax.utils.untrusted_text import read_text, sanitize

COLUMNS = ("file", "label", "i0", "i1", "j0", "j1", "k0", "k1")


class VoxelBox(NamedTuple):
    """First and last voxel of a label along the three axes of its file, both inside the box."""

    label: str
    first: tuple[int, int, int]
    last: tuple[int, int, int]


class SliceBox(NamedTuple):
    """A box of a class in one slice.

    edges: (x0, y0, x1, y1), the outer edges of its outermost pixels: pixel n reaches from n to
    n + 1.
    """

    class_id: int
    edges: tuple[int, int, int, int]


SliceBoxes = Mapping[int, Sequence[SliceBox]]  # by slice


def read_boxes(path: StrPath) -> dict[str, list[VoxelBox]]:
    """Reads a CSV file with the columns `COLUMNS`, by the file name without its volume suffix.

    A box that is thick along the axis of the slices prompts each of them; a label may have several.

    Raises:
        UserError: the file is no such table.
    """
    try:
        reader = csv.reader(io.StringIO(read_text(path, "table of boxes")))
        rows = [tuple(cell.strip() for cell in row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"table of boxes {path} is no CSV file: {error}; correct it") from None
    if len(rows) < 2 or rows[0] != COLUMNS:
        raise UserError(
            f"table of boxes {path} needs the line {','.join(COLUMNS)} and at least one box"
        )
    boxes: dict[str, list[VoxelBox]] = {}
    for row in rows[1:]:
        name, box = _parsed(row, path)
        boxes.setdefault(name, []).append(box)
    return boxes


def _parsed(row: Sequence[str], path: StrPath) -> tuple[str, VoxelBox]:
    digits = row[2:]
    whole = len(row) == len(COLUMNS) and all(row[:2])
    if whole and all(text.isascii() and text.isdigit() and len(text) < 10 for text in digits):
        i0, i1, j0, j1, k0, k1 = map(int, digits)
        if i0 <= i1 and j0 <= j1 and k0 <= k1:
            return stem_of(Path(row[0])), VoxelBox(row[1], (i0, j0, k0), (i1, j1, k1))
    raise UserError(
        f"table of boxes {path} has the line {sanitize(','.join(row), 80)!r}; each must be "
        "FILE,LABEL and the first and last voxel of the box along each axis, counted from 0"
    )


def slice_boxes(
    boxes: Iterable[VoxelBox], grid: SourceGrid, class_ids: Mapping[str, int]
) -> dict[int, list[SliceBox]]:
    """Returns the boxes of a volume by slice, in display orientation.

    Raises:
        UserError: a box lies outside the volume, or its label has no class.
    """
    shape, found = grid.shape[:3], dict[int, list[SliceBox]]()
    for box in boxes:
        if box.label not in class_ids:
            raise UserError(
                f"{grid.path} has a box of {sanitize(box.label)!r}, which the label table lacks; "
                "correct one of them"
            )
        if any(last >= n for last, n in zip(box.last, shape, strict=True)):
            raise UserError(
                f"{grid.path} has {' x '.join(map(str, shape))} voxels, and a box of "
                f"{sanitize(box.label)!r} ends at voxel {box.last}; count from 0 along the axes of "
                "the file"
            )
        ranges = [(0, 0)] * 3
        for first, last, n, (axis, direction) in zip(
            box.first, box.last, shape, grid.moves.astype(int).tolist(), strict=True
        ):
            ranges[axis] = (first, last) if direction > 0 else (n - 1 - last, n - 1 - first)
        (start, end), (top, bottom), (left, right) = ranges
        one = SliceBox(class_ids[box.label], (left, top, right + 1, bottom + 1))
        for index in range(start, end + 1):
            found.setdefault(index, []).append(one)
    return found


def boxes_around(ids: np.ndarray) -> dict[int, list[SliceBox]]:
    """Returns the box around each class in each slice of class ids (D, H, W)."""
    found = {}
    for index, truth in enumerate(ids):
        classes = np.unique(truth)
        if len(of_slice := [_around(truth == c, int(c)) for c in classes if c]):
            found[index] = of_slice
    return found


def _around(mask: np.ndarray, class_id: int) -> SliceBox:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    left, top, right, bottom = map(int, edges)
    return SliceBox(class_id, (left, top, right, bottom))


def class_names(boxes: Mapping[str, Iterable[VoxelBox]]) -> tuple[str, ...]:
    """Returns the background and the labels of a table of boxes in the order of appearance."""
    labels = dict.fromkeys(box.label for of_file in boxes.values() for box in of_file)
    return ("background", *(label for label in labels if label != "background"))
