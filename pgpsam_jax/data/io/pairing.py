"""Aligns the voxels of a label with those of its image, by the affines of both.

A label may be stored with its axes in another order or direction than its image; its affine says
so, and its array is reoriented. If one of the two has evidently lost its orientation, the arrays
are paired as stored, with a warning. If the affines contradict each other and neither is evidently
wrong, the pair is rejected. Nothing is resampled.
"""

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.io.voxel_grid import TOLERANCE_MM, SourceGrid, corner_distance, to_display

LOST, AWAY = "orientation_lost", "affine_mismatch"
_NEAR = 0.5  # of the shortest side of the image; within it two affines describe the same place
_SPACING = 1e-3  # relative
_STRAIGHT = 0.8  # cosine between matching axes; below it they do not match
_WHO = ("the image", "the label")
_LOOK = "look at an overlay, then copy the affine from the one that is right"


@dataclass(frozen=True)
class Pairing:
    """Reorientation of a label to its image.

    Stored axis `a` of the image is the label's stored axis `axes[a]`, reversed if `flips[a]`. The
    warning about the label file, `code` and `remark`, is empty if the affines agree.
    """

    image: SourceGrid
    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)
    code: str = ""
    remark: str = ""

    @property
    def turns(self) -> bool:
        """Whether the label's array is reoriented."""
        return self.axes != (0, 1, 2) or any(self.flips)

    def display(self, stored: np.ndarray) -> np.ndarray:
        """Reorients the stored array (X, Y, Z) of the label to the displayed image (D, H, W)."""
        turned = np.flip(stored.transpose(self.axes), [a for a in range(3) if self.flips[a]])
        return to_display(turned, self.image)


def pair_grids(image: SourceGrid, label: SourceGrid) -> Pairing:
    """Returns how to reorient a label to its image; raises `BadFile` if they do not match."""
    if image.has_orientation != label.has_orientation:
        who = _WHO[image.has_orientation]
        return _as_stored(image, label, f"{who} says nothing about its orientation")
    axes, flips, straight = _turn(image, label)
    distance = _distance(image, label, axes, flips)
    if distance is not None and distance <= TOLERANCE_MM:
        return Pairing(image, axes, flips)
    sides = [n * s for n, s in zip(image.shape, _sizes(image), strict=False)]
    near = distance is not None and distance <= _NEAR * min(sides) and _same_spacing(image, label)
    if not near:
        lost = [_is_identity(grid) for grid in (image, label)]
        if any(lost):
            whose = "both affines are" if all(lost) else f"the affine of {_WHO[lost[1]]} is"
            return _as_stored(image, label, f"{whose} the identity")
        turns = Pairing(image, axes, flips).turns
        if not straight or (turns and any(map(_is_default, (image, label)))):
            raise _conflict(image, label, distance)
    if distance is None:
        raise _mismatch(image, label, [label.shape[a] for a in axes])
    return Pairing(image, axes, flips, AWAY, _offset_remark(image, label, distance))


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
    shown = tuple(int(shape[a]) for a in image.axes)
    return BadFile(
        f"{label.path} has shape {shown} but its image {image.path} has {image.display_shape} "
        "(slices, rows, columns); pair the right files or resample the label",
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


def _turn(image: SourceGrid, label: SourceGrid):
    """Returns axes and flips of a `Pairing` by the affines, and whether the axes match at all."""
    between = np.linalg.solve(image.affine, label.affine)  # label voxel -> image voxel
    moves = nib.io_orientation(between)
    if np.isnan(moves).any():
        return (0, 1, 2), (False,) * 3, False
    axes = tuple(int(a) for a in np.argsort(moves[:, 0]))
    directions = [grid.affine[:3, :3] / _sizes(grid) for grid in (image, label)]
    cosines = [abs(directions[0][:, a] @ directions[1][:, axes[a]]) for a in range(3)]
    return axes, tuple(bool(moves[a, 1] < 0) for a in axes), min(cosines) > _STRAIGHT


def _distance(image: SourceGrid, label: SourceGrid, axes, flips) -> float | None:
    """Returns the largest distance in mm between corners; None if the shapes differ."""
    shape = image.shape[:3]
    if tuple(label.shape[a] for a in axes) != shape:
        return None
    move = np.zeros((4, 4))  # image voxel -> label voxel
    move[3, 3] = 1
    for a, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        move[axis, a], move[axis, 3] = (-1, shape[a] - 1) if flip else (1, 0)
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
