"""Aligns the voxels of a label with those of its image, by the affines of both.

A label may be stored with its axes in another order or direction than its image; its affine says
so, and its array is reoriented. If one of the two has evidently lost its orientation, the arrays
are paired as stored, with a warning. If the affines contradict each other and neither is evidently
wrong, the pair is rejected. Nothing is resampled.
"""

from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.io.voxel_grid import (
    AS_STORED,
    TOLERANCE_MM,
    SourceGrid,
    corner_distance,
    moved_shape,
    to_display,
)

LOST, AWAY = "orientation_lost", "affine_mismatch"
_NEAR = 0.5  # of the shortest side of the image; within it two affines describe the same place
_SPACING = 1e-3  # relative
_STRAIGHT = 0.8  # cosine between matching axes; below it they do not match
_WHO = ("the image", "the label")
_LOOK = "look at an overlay, then copy the affine from the one that is right"


@dataclass(frozen=True, eq=False)
class Pairing:
    """Reorientation of a label to its image.

    Attributes:
        image: its grid.
        moves: (3, 2) the image's stored axis and direction of each stored axis of the label.
        code, remark: the warning about the label file, empty if the affines agree.
    """

    image: SourceGrid
    moves: np.ndarray = field(default_factory=lambda: AS_STORED)
    code: str = ""
    remark: str = ""

    @property
    def turns(self) -> bool:
        """Whether the label's array is reoriented."""
        return not np.array_equal(self.moves, AS_STORED)

    def display(self, stored: np.ndarray) -> np.ndarray:
        """Reorients the stored array (X, Y, Z) of the label to the displayed image (D, H, W)."""
        return to_display(nib.apply_orientation(stored, self.moves), self.image)


def pair_grids(image: SourceGrid, label: SourceGrid) -> Pairing:
    """Returns how to reorient a label to its image; raises `BadFile` if they do not match."""
    if image.has_orientation != label.has_orientation:
        who = _WHO[image.has_orientation]
        return _as_stored(image, label, f"{who} says nothing about its orientation")
    moves, straight = _moves(image, label)
    distance = _distance(image, label, moves)
    if distance is not None and distance <= TOLERANCE_MM:
        return Pairing(image, moves)
    sides = [n * s for n, s in zip(image.shape, _sizes(image), strict=False)]
    near = distance is not None and distance <= _NEAR * min(sides) and _same_spacing(image, label)
    if not near:
        lost = [_is_identity(grid) for grid in (image, label)]
        if any(lost):
            whose = "both affines are" if all(lost) else f"the affine of {_WHO[lost[1]]} is"
            return _as_stored(image, label, f"{whose} the identity")
        turns = Pairing(image, moves).turns
        if not straight or (turns and any(map(_is_default, (image, label)))):
            raise _conflict(image, label, distance)
    if distance is None:
        raise _mismatch(image, label, moved_shape(label.shape, moves))
    return Pairing(image, moves, AWAY, _offset_remark(image, label, distance))


def _as_stored(image: SourceGrid, label: SourceGrid, why: str) -> Pairing:
    if image.shape[:3] != label.shape[:3]:
        raise _mismatch(image, label, label.shape[:3])
    remark = (
        f"is paired with its image voxel by voxel as both are stored, because {why}; if their "
        f"orientations differ on disk, the labels are misaligned: {_LOOK}"
    )
    return Pairing(image, code=LOST, remark=remark)


def _mismatch(image: SourceGrid, label: SourceGrid, shape) -> BadFile:
    """`shape`: that of the label, along the stored axes of the image."""
    return BadFile(
        f"{label.path} has shape {moved_shape(shape, image.moves)} but its image {image.path} has "
        f"{image.display_shape} (slices, rows, columns); pair the right files or resample the "
        "label",
        "shape_mismatch",
    )


def _conflict(image: SourceGrid, label: SourceGrid, distance: float | None) -> BadFile:
    apart = "" if distance is None else f", {distance:.0f} mm apart"
    return BadFile(
        f"{label.path} contradicts its image {image.path} by its affine ({label.orientation} "
        f"and {image.orientation}{apart}), and neither is evidently wrong; copy the "
        "affine from the image if the voxels are stored alike, else resample the label",
        "affine_conflict",
    )


def _moves(image: SourceGrid, label: SourceGrid) -> tuple[np.ndarray, bool]:
    """Returns `moves` of a `Pairing` by the affines, and whether the axes match at all."""
    between = np.linalg.solve(image.affine, label.affine)  # label voxel -> image voxel
    moves = nib.io_orientation(between)
    if np.isnan(moves).any():
        return AS_STORED, False
    of_image, of_label = (grid.affine[:3, :3] / _sizes(grid) for grid in (image, label))
    cosines = np.abs((of_image[:, moves[:, 0].astype(int)] * of_label).sum(axis=0))
    return moves, bool(cosines.min() > _STRAIGHT)


def _distance(image: SourceGrid, label: SourceGrid, moves: np.ndarray) -> float | None:
    """Returns the largest distance in mm between corners; None if the shapes differ."""
    shape = image.shape[:3]
    if moved_shape(label.shape, moves) != shape:
        return None
    move = inv_ornt_aff(moves, label.shape[:3])  # image voxel -> label voxel
    return corner_distance(shape, image.millimeters, label.millimeters @ move)


def _sizes(grid: SourceGrid) -> np.ndarray:
    """Returns the voxel size along the stored axes, in mm."""
    return np.linalg.norm(grid.millimeters[:3, :3], axis=0)


def _same_spacing(image: SourceGrid, label: SourceGrid) -> bool:
    sizes = np.sort([_sizes(image), _sizes(label)])
    return bool(np.abs(sizes[0] / sizes[1] - 1).max() <= _SPACING)


def _is_default(grid: SourceGrid) -> bool:
    """Whether the affine has no rotation and no translation, as programs without one write."""
    columns = grid.affine[:3, :3]
    return not grid.affine[:3, 3].any() and not (columns - np.diag(np.diag(columns))).any()


def _is_identity(grid: SourceGrid) -> bool:
    """Whether the affine is that of arrays saved without one."""
    return _is_default(grid) and bool((np.abs(np.diag(grid.affine)) == 1).all())


def _offset_remark(image: SourceGrid, label: SourceGrid, distance: float) -> str:
    sizes = [" x ".join(f"{s:.4g}" for s in grid.spacing) for grid in (label, image)]
    voxels = "" if _same_spacing(image, label) else f", with voxels of {' mm and '.join(sizes)} mm"
    return (
        f"lies up to {distance:.2f} mm off its image by its affine{voxels}; voxels are paired "
        f"along the axes that both affines name: {_LOOK}"
    )
