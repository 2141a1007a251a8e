"""Voxel grid of a file and its mapping to display orientation.

A volume is sliced along one axis of the body (`AXES`): axial slices run from inferior to superior,
coronal ones from anterior to posterior, sagittal ones from the patient's right to left.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

TOLERANCE_MM = 0.1  # between corners of image and label; below it affines differ by rounding only
_MILLIMETERS = {1: 1000.0, 2: 1.0, 3: 1e-3}  # NIfTI code of the spatial unit; 0 means millimeters
AXIAL = "axial"
AXES = {AXIAL: "SPL", "coronal": "PIL", "sagittal": "LIP"}  # directions of slices, rows, columns
_SLICED = ("sagittal", "coronal", AXIAL)  # slices along the first, second, third axis of RAS
_THICK = 1.5  # pixels between slices from which on they give the acquisition axis
_SHEAR = 1e-3  # cosine between two axes from which on they are reported


@dataclass(frozen=True, eq=False)
class SourceGrid:
    """Voxel grid of a file, with the axis order and flips to display orientation.

    Display axis `d` is axis `axes[d]` of the file, reversed if `flips[d]`.
    """

    path: Path
    header: nib.Nifti1Header
    affine: np.ndarray
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    @classmethod
    def of(cls, path: Path, header: nib.Nifti1Header, affine: np.ndarray) -> "SourceGrid":
        """Returns a grid in axial display orientation."""
        return cls(path, header, affine, (0, 1, 2), (False,) * 3).along(AXIAL)

    def along(self, axis: str) -> "SourceGrid":
        """Returns the same voxels sliced along an axis of the body, one of `AXES`.

        A single slice stays that slice, whatever its orientation.
        """
        body = nib.io_orientation(self.affine)
        thin = [a for a, n in enumerate(self.shape[:3]) if n == 1]
        if len(thin) == 1:
            axis = _SLICED[int(body[thin[0], 0])]
        moves = nib.orientations.ornt_transform(body, nib.orientations.axcodes2ornt(AXES[axis]))
        axes = tuple(int(a) for a in np.argsort(moves[:, 0]))
        return replace(self, axes=axes, flips=tuple(bool(moves[a, 1] < 0) for a in axes))

    @property
    def thick_axis(self) -> str | None:
        """The axis along which slices were acquired; None for nearly isotropic voxels."""
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        *_, second, first = np.argsort(sizes)
        if self.shape[first] == 1 or sizes[first] < _THICK * sizes[second]:
            return None
        return _SLICED[int(nib.io_orientation(self.affine)[first, 0])]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file, with trailing singleton axes; a single slice gets a third axis."""
        shape = tuple(int(n) for n in self.header.get_data_shape())
        return shape if len(shape) > 2 else (*shape, 1)

    @property
    def display_shape(self) -> tuple[int, int, int]:
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def display_affine(self) -> np.ndarray:
        """4 x 4 matrix from display voxel (d, h, w) to RAS+ millimeters."""
        move = np.zeros((4, 4))
        move[3, 3] = 1
        for display, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            move[axis, display] = -1 if flip else 1
            move[axis, 3] = self.shape[axis] - 1 if flip else 0
        return self.millimeters @ move

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in millimeters, display order (D, H, W)."""
        return tuple(float(s) for s in np.linalg.norm(self.display_affine[:3, :3], axis=0))

    @property
    def millimeters(self) -> np.ndarray:
        """4 x 4 matrix from stored voxel (x, y, z) to RAS+ millimeters, whatever the unit."""
        scale = _MILLIMETERS.get(int(self.header["xyzt_units"]) & 7, 1.0)
        return np.diag([scale, scale, scale, 1]) @ self.affine

    @property
    def orientation(self) -> str:
        """Directions in which the file's axes grow, such as `LPS`."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def has_orientation(self) -> bool:
        """Whether the file states its orientation; otherwise LAS is assumed."""
        return bool(self.header["qform_code"] or self.header["sform_code"])

    def remarks(self) -> list[tuple[str, str]]:
        """Returns (code, sentence) for each warning about the grid."""
        found = []
        if not self.has_orientation:
            found.append(
                (
                    "no_orientation",
                    "says nothing about its orientation (both form codes are 0), so left and right "
                    f"may be swapped; its axes are assumed to be {self.orientation}: copy the "
                    "affine from the original",
                )
            )
        (qform, qcode), (sform, scode) = self.qform, self.sform
        if qcode and scode:
            distance = corner_distance(self.shape[:3], qform, sform)
            if not distance <= TOLERANCE_MM:
                found.append(
                    (
                        "two_affines",
                        f"has a qform and an sform that differ by up to {distance:.2f} mm; "
                        "programs disagree on which one counts, here it is the sform",
                    )
                )
        columns = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        shear = np.abs(columns.T @ columns - np.eye(3)).max()
        if shear > _SHEAR:
            degrees = np.degrees(np.arcsin(min(shear, 1.0)))
            found.append(
                (
                    "shear",
                    f"has axes {degrees:.2f} degrees from a right angle, which other tools refuse; "
                    "resample it unless that is intended",
                )
            )
        return found

    @property
    def qform(self) -> tuple[np.ndarray | None, int]:
        """Matrix and code; the matrix is None where the code is 0."""
        return self.header.get_qform(coded=True)

    @property
    def sform(self) -> tuple[np.ndarray | None, int]:
        """Matrix and code; the matrix is None where the code is 0."""
        return self.header.get_sform(coded=True)


def corner_distance(shape, first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest distance in mm between corners of an array under two affines."""
    ends = [(0, n - 1) for n in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], float)
    moved = corners @ (first - second).T
    return float(np.linalg.norm(moved[:, :3], axis=1).max())


def to_display(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """Returns a view of a stored array (X, Y, Z) as (D, H, W)."""
    flip = [d for d in range(3) if source.flips[d]]
    return np.flip(array.transpose(source.axes), flip)


def to_source(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """Returns a view of a displayed array (D, H, W) as (X, Y, Z); inverse of `to_display`."""
    flip = [d for d in range(3) if source.flips[d]]
    return np.flip(array, flip).transpose(np.argsort(source.axes))
