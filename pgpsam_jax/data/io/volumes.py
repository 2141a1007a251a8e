"""Reads volumes of any format: NIfTI files or plain arrays."""

import hashlib

import numpy as np

from pgpsam_jax.data.io import array_files, nifti
from pgpsam_jax.data.io.array_files import ArrayFiles, Source
from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.io.volume_files import check_entry, halves
from pgpsam_jax.data.io.voxel_grid import AXIAL, SourceGrid
from pgpsam_jax.utils.files import file_digest


def read_image(source: Source, axis: str = AXIAL) -> Volume:
    """Reads intensities as float32.

    Args:
        source: a NIfTI file or plain arrays.
        axis: the axis of the body to slice along, one of `voxel_grid.AXES`; plain arrays are
            sliced along their first axis.

    Raises:
        UserError: not one intact, finite volume or slice.
    """
    return _read(source, axis, np.float32)


def read_label(source: Source, axis: str = AXIAL) -> Volume:
    """Reads source label ids as int32, also if stored as floats; see `read_image`."""
    return _read(source, axis, np.int32)


def _read(source: Source, axis: str, dtype) -> Volume:
    raw, grid, _ = read_raw(source)
    grid = grid if isinstance(source, ArrayFiles) else grid.along(axis)
    return nifti.to_volume(raw, grid, dtype)


def read_raw(source: Source) -> tuple[np.ndarray, SourceGrid, int]:
    """Returns the stored voxels (X, Y, Z), the grid and the number of trailing bytes."""
    return _reader(source).read_raw(source)


def read_grid(source: Source) -> SourceGrid:
    """Reads the header: the grid on which a prediction is written."""
    return _reader(source).read_grid(source)


def _reader(source: Source):
    return array_files if isinstance(source, ArrayFiles) else nifti


def digest(source: Source) -> str:
    """Returns the SHA-256 of the files."""
    for path in files_of(source):
        check_entry(path)
    if isinstance(source, ArrayFiles):
        return source.digest()
    first, *second = map(file_digest, files_of(source))
    return hashlib.sha256((first + second[0]).encode()).hexdigest() if second else first


def files_of(source: Source) -> tuple:
    """Returns the files of a volume."""
    return source.files if isinstance(source, ArrayFiles) else halves(source)
