"""Volumes from `.npz` slices and HDF5, which carry no voxel grid.

Array axes are assumed to be in display orientation (slices, rows, columns) with voxels of 1 mm.
Files are untrusted: no pickle; types and sizes are checked before memory is allocated. For HDF5
see `hdf5`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.io import hdf5
from pgpsam_jax.data.io.array_checks import OpenArray, check_size, check_type
from pgpsam_jax.data.io.volume_files import check_entry
from pgpsam_jax.data.io.volume_streams import read_numbers, reading_errors
from pgpsam_jax.utils.files import file_digest

if TYPE_CHECKING:
    from pgpsam_jax.data.io.voxel_grid import SourceGrid

NO_GRID = (
    "The files carry no voxel size and no orientation: every voxel counts as 1 mm, distances are "
    "in voxels, and masks are written on such a grid with the arrays' own axes."
)
_UNIT_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_SIDE = 32767  # the limit of a NIfTI header, for predictions


@dataclass(frozen=True)
class ArrayFiles:
    """The array `key` of one `.npz` file per slice (H, W), or of one HDF5 file (D, H, W)."""

    files: tuple[Path, ...]
    key: str

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more} ({self.key})"

    @property
    def name(self) -> str:
        """Name of the first file."""
        return self.files[0].name

    def is_file(self) -> bool:
        """Whether all files exist."""
        return all(path.is_file() for path in self.files)

    def digest(self) -> str:
        """SHA-256 over the content of the files, in order, and the key."""
        text = "".join(f"{file_digest(path)}\n" for path in self.files) + self.key
        return hashlib.sha256(text.encode()).hexdigest()


Source = Path | ArrayFiles  # read by `volumes`


def read_grid(source: ArrayFiles) -> SourceGrid:
    """Returns the unit grid of the volume, from the header of the first file."""
    with _array(source.files[0], source.key) as array:
        return _grid(source, array.shape)


def read_raw(source: ArrayFiles) -> tuple[np.ndarray, SourceGrid, int]:
    """Returns voxels (W, H, D) in their stored type and the unit grid, like `nifti.read_raw`."""
    with _array(source.files[0], source.key) as array:
        grid, first = _grid(source, array.shape), array.read()
    if first.ndim == 3:
        return first.transpose(2, 1, 0), grid, 0
    volume = np.empty((len(source.files), *first.shape), first.dtype)
    volume[0] = first
    for index, path in enumerate(source.files[1:], 1):
        with _array(path, source.key) as array:
            if array.shape != first.shape or array.dtype != first.dtype:
                raise BadFile(
                    f"{path} has {source.key} {array.dtype} {array.shape}, its neighbor "
                    f"{source.files[0].name} {first.dtype} {first.shape}; export the case again",
                    "shape",
                )
            volume[index] = array.read()
    return volume.transpose(2, 1, 0), grid, 0


def _grid(source: ArrayFiles, shape) -> SourceGrid:
    import nibabel as nib  # slow; listing files, as for `verify --help`, needs no grid

    from pgpsam_jax.data.io.voxel_grid import AS_STORED, SourceGrid

    path = Path(str(source))
    volume = shape if len(shape) == 3 else (len(source.files), *shape)
    if len(shape) not in (2, 3) or min(volume) < 1 or max(volume) > _MAX_SIDE:
        raise BadFile(f"{path} has shape {shape}; expected one slice or one volume", "shape")
    if len(shape) == 3 and len(source.files) > 1:
        raise BadFile(f"{path} has shape {shape}; expected one slice per file", "shape")
    check_size(path, volume)
    header = nib.Nifti1Header()
    header.set_data_shape(volume[::-1])
    header.set_data_dtype(np.float32)
    header.set_sform(_UNIT_LPS, 1)
    return SourceGrid(path, header, _UNIT_LPS.copy(), AS_STORED[::-1])


@contextlib.contextmanager
def _array(path: Path, key: str):
    """Opens an array as an `OpenArray`."""
    opened = _npz if path.suffix.lower() == ".npz" else hdf5.opened
    with reading_errors(path):
        check_entry(path)
        with opened(path, key) as array:
            yield array


@contextlib.contextmanager
def _npz(path: Path, key: str):
    try:
        with zipfile.ZipFile(path) as archive:
            try:
                entry = archive.getinfo(f"{key}.npy")
            except KeyError:
                held = ", ".join(sorted(archive.namelist())[:5]) or "nothing"
                raise BadFile(f"{path} has no array {key!r} (it holds {held})", "key") from None
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadFile(f"{path} is compressed in an unusual way; save it again", "header")
            with archive.open(entry) as stream:
                shape, dtype, order = _npy_header(path, stream)
                check_type(path, key, shape, dtype)
                yield OpenArray(shape, dtype, lambda: _read_npy(path, stream, shape, dtype, order))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise BadFile(
            f"{path} is damaged or no .npz ({error}); get a new copy", "damaged"
        ) from None


def _read_npy(path: Path, stream, shape, dtype: np.dtype, order: Literal["C", "F"]) -> np.ndarray:
    array, done = read_numbers(stream, math.prod(shape), dtype)
    if done < array.nbytes or stream.read(1):  # the last read checks the CRC
        raise BadFile(f"{path} does not have its declared length; get a new copy", "damaged")
    return array.reshape(shape, order=order)


def _npy_header(path: Path, stream):
    try:
        if np.lib.format.read_magic(stream) != (1, 0):  # later versions are not for plain arrays
            raise ValueError("its version is not 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # from tokenizer, parser or dtype
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadFile(
            f"{path} has a broken array header ({reason}); save it again", "header"
        ) from None
    if any(n < 0 for n in shape):
        raise BadFile(f"{path} declares the shape {shape}; save it again", "shape")
    return shape, dtype, "F" if fortran else "C"
