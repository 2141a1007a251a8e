"""Voxel grid of a file and its mapping to display orientation.

A volume is sliced along one axis of the body (`AXES`): axial slices run from inferior to superior,
coronal ones from anterior to posterior, sagittal ones from the patient's right to left.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

TOLERANCE_MM = 0.1  # between corners of image and label; below it affines differ by rounding only
_MILLIMETERS = {1: 1000.0, 2: 1.0, 3: 1e-3}  # NIfTI code of the spatial unit; 0 means millimeters
AS_STORED = np.array([[0, 1], [1, 1], [2, 1]])  # axes neither reordered nor reversed
AXIAL = "axial"
AXES = {AXIAL: "SPL", "coronal": "PIL", "sagittal": "LIP"}  # directions of slices, rows, columns
_SLICED = ("sagittal", "coronal", AXIAL)  # slices along the first, second, third axis of RAS
_THICK = 1.5  # pixels between slices from which on they give the acquisition axis
_SHEAR = 1e-3  # cosine between two axes from which on they are reported


@dataclass(frozen=True, eq=False)
class SourceGrid:
    """Voxel grid of a file.

    Attributes:
        path, header, affine: of the file; stored voxel to RAS+ in the unit of the header.
        moves: (3, 2) display axis and direction (1 or -1) of each stored axis, as nibabel's `ornt`.
    """

    path: Path
    header: nib.Nifti1Header
    affine: np.ndarray
    moves: np.ndarray

    @classmethod
    def of(cls, path: Path, header: nib.Nifti1Header, affine: np.ndarray) -> "SourceGrid":
        """Returns a grid in axial display orientation."""
        return cls(path, header, affine, AS_STORED).along(AXIAL)

    def along(self, axis: str) -> "SourceGrid":
        """Returns the same voxels sliced along an axis of the body, one of `AXES`.

        A single slice stays that slice, whatever its orientation.
        """
        body = nib.io_orientation(self.affine)
        thin = [a for a, n in enumerate(self.shape[:3]) if n == 1]
        if len(thin) == 1:
            axis = _SLICED[int(body[thin[0], 0])]
        return replace(self, moves=ornt_transform(body, axcodes2ornt(AXES[axis])))

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
        return moved_shape(self.shape, self.moves)

    @property
    def display_affine(self) -> np.ndarray:
        """4 x 4 matrix from display voxel (d, h, w) to RAS+ millimeters."""
        return self.millimeters @ inv_ornt_aff(self.moves, self.shape[:3])

    @property
    def directions(self) -> str:
        """The sides of the body to which displayed slices, rows and columns run, as in `AXES`."""
        return "".join(nib.aff2axcodes(self.display_affine))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in millimeters, display order (D, H, W)."""
        d, h, w = np.linalg.norm(self.display_affine[:3, :3], axis=0).tolist()
        return d, h, w

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

    def remarks(self) -> dict[str, str]:
        """Returns the warnings about the grid: code -> sentence."""
        found = {}
        if not self.has_orientation:
            found["no_orientation"] = (
                "says nothing about its orientation (both form codes are 0), so left and right may "
                f"be swapped; its axes are assumed to be {self.orientation}: copy the affine from "
                "the original"
            )
        qform, sform = (
            get(coded=True)[0] for get in (self.header.get_qform, self.header.get_sform)
        )
        if qform is not None and sform is not None:  # None where the code is 0
            distance = corner_distance(self.shape[:3], qform, sform)
            if not distance <= TOLERANCE_MM:
                found["two_affines"] = (
                    f"has a qform and an sform that differ by up to {distance:.2f} mm; programs "
                    "disagree on which one counts, here it is the sform"
                )
        columns = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        shear = np.abs(columns.T @ columns - np.eye(3)).max()
        if shear > _SHEAR:
            degrees = np.degrees(np.arcsin(min(shear, 1.0)))
            found["shear"] = (
                f"has axes {degrees:.2f} degrees from a right angle, which other tools refuse; "
                "resample it unless that is intended"
            )
        return found


def corner_distance(shape, first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest distance in mm between corners of an array under two affines."""
    ends = [(0, n - 1) for n in shape]
    corners = np.array([(*corner, 1) for corner in itertools.product(*ends)], float)
    moved = corners @ (first - second).T
    return float(np.linalg.norm(moved[:, :3], axis=1).max())


def to_display(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """Returns a view of a stored array (X, Y, Z) as (D, H, W)."""
    return nib.apply_orientation(array, source.moves)


def to_source(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """Returns a view of a displayed array (D, H, W) as (X, Y, Z); inverse of `to_display`."""
    return nib.apply_orientation(array, ornt_transform(AS_STORED, source.moves))


def moved_shape(shape, moves: np.ndarray) -> tuple[int, int, int]:
    """Returns the shape of an array after `nibabel.apply_orientation`."""
    x, y, z = (int(shape[axis]) for axis in np.argsort(moves[:, 0]))
    return x, y, z
