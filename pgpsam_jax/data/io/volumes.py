"""The volumes of a case, whatever a layout keeps them in: NIfTI files or plain arrays."""

import hashlib

import numpy as np

from pgpsam_jax.data.io import array_files, nifti
from pgpsam_jax.data.io.array_files import ArrayFiles
from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.io.volume_files import check_entry, halves
from pgpsam_jax.data.io.voxel_grid import AXIAL, SourceGrid
from pgpsam_jax.data.layouts.cases import Source
from pgpsam_jax.utils.files import file_digest


def read_image(source: Source, axis: str = AXIAL) -> Volume:
    """As `nifti.read_image`; plain arrays are cut along their first axis, whatever `axis` is."""
    return _read(source, axis, np.float32)


def read_label(source: Source, axis: str = AXIAL) -> Volume:
    """As `nifti.read_label`; plain arrays as above."""
    return _read(source, axis, np.int32)


def _read(source: Source, axis: str, dtype) -> Volume:
    raw, grid, _ = read_raw(source)
    return nifti.to_volume(raw, grid if isinstance(source, ArrayFiles) else grid.along(axis), dtype)


def read_raw(source: Source) -> tuple[np.ndarray, SourceGrid, int]:
    """As `nifti.read_raw`: stored voxels (X, Y, Z), grid, bytes left over."""
    if isinstance(source, ArrayFiles):
        return *array_files.read_raw(source), 0
    return nifti.read_raw(source)


def read_grid(source: Source) -> SourceGrid:
    """The grid that a prediction has to be written on, from the header alone."""
    return (
        array_files.read_grid(source) if isinstance(source, ArrayFiles) else nifti.read_grid(source)
    )


def digest(source: Source) -> str:
    """SHA-256 of the files' bytes."""
    for path in files_of(source):
        check_entry(path)
    if isinstance(source, ArrayFiles):
        return source.digest()
    first, *second = [file_digest(path) for path in halves(source)]
    return hashlib.sha256((first + second[0]).encode()).hexdigest() if second else first


def files_of(source: Source) -> list:
    """The files a volume is read from."""
    return list(source.files if isinstance(source, ArrayFiles) else halves(source))
