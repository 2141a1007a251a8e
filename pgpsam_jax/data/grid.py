"""The voxel grid of a file, and the way to the display orientation that the program works in."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

TOLERANCE_MM = 0.1  # of image and label corners; below it affines differ by rounding only
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 1e-3}  # NIfTI code of the spatial unit; 0 means millimetres


@dataclass(frozen=True, eq=False)
class SourceGrid:
    """Voxel grid of a file, and the axis order and flips that lead to display orientation.

    Display axis `d` is axis `axes[d]` of the file, reversed where `flips[d]`.
    """

    path: Path
    header: nib.Nifti1Header
    affine: np.ndarray
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file, trailing singleton axes included."""
        return tuple(int(n) for n in self.header.get_data_shape())

    @property
    def display_shape(self) -> tuple[int, int, int]:
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def display_affine(self) -> np.ndarray:
        """4 x 4 matrix from display voxel (d, h, w) to RAS+ millimetres."""
        move = np.zeros((4, 4))
        move[3, 3] = 1
        for display, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            move[axis, display] = -1 if flip else 1
            move[axis, 3] = self.shape[axis] - 1 if flip else 0
        scale = _MILLIMETRES.get(int(self.header["xyzt_units"]) & 7, 1.0)
        return np.diag([scale, scale, scale, 1]) @ self.affine @ move

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in millimetres, display order (D, H, W)."""
        return tuple(float(s) for s in np.linalg.norm(self.display_affine[:3, :3], axis=0))

    def distance(self, other: "SourceGrid") -> float:
        """Largest distance in mm between the corner voxels of two grids in display orientation."""
        return corner_distance(self.display_shape, self.display_affine, other.display_affine)

    @property
    def orientation(self) -> str:
        """Directions in which the file's axes grow, such as `LPS`."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def qform(self) -> tuple[np.ndarray | None, int]:
        """Matrix and code; the matrix is None where the code is 0."""
        return self.header.get_qform(coded=True)

    @property
    def sform(self) -> tuple[np.ndarray | None, int]:
        """Matrix and code; the matrix is None where the code is 0."""
        return self.header.get_sform(coded=True)


def corner_distance(shape, first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance in mm between the corners of one array under two affines (4, 4)."""
    ends = [(0, n - 1) for n in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], float)
    moved = corners @ (first - second).T
    return float(np.linalg.norm(moved[:, :3], axis=1).max())


def to_display(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """View of an array on the file's three axes, (X, Y, Z), as (D, H, W)."""
    flip = [d for d in range(3) if source.flips[d]]
    return np.flip(array.transpose(source.axes), flip)


def to_source(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """Inverse of `to_display`, also a view."""
    flip = [d for d in range(3) if source.flips[d]]
    return np.flip(array, flip).transpose(np.argsort(source.axes))
