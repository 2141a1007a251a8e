"""Reads and writes NIfTI volumes in display orientation.

A volume in memory is `(D, H, W)`: slices, rows, columns. For axial slices, D runs from inferior to
superior, H from anterior to posterior, W from the patient's right to left. A `SourceGrid` keeps how
the file stores the volume, so that predictions are written voxel by voxel. Files are untrusted:
sizes are checked before memory is allocated; gzip streams are read to their end, where the checksum
is, but never past the declared size.
"""

import functools
import io
import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.io.nifti_header import parse_header
from pgpsam_jax.data.io.volume_streams import Opened, opened, read_numbers, reading_errors
from pgpsam_jax.data.io.voxel_grid import SourceGrid, to_display, to_source
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import atomic_path

_MAX_TRAILING = 1 << 20  # padding tolerated after the voxels before a gzip counts as a bomb
_MAX_PACKING = 1032  # bytes that one byte of a deflate stream can unpack to: 258 per two bits


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume in display orientation: array (D, H, W), spacing in mm (D, H, W), source grid."""

    array: np.ndarray
    spacing: tuple[float, float, float]
    source: SourceGrid

    def along(self, axis: str) -> "Volume":
        """Returns the same voxels sliced along another axis, one of `voxel_grid.AXES`."""
        grid = self.source.along(axis)
        array = to_display(to_source(self.array, self.source), grid)
        return Volume(np.ascontiguousarray(array), grid.spacing, grid)


def read_grid(path) -> SourceGrid:
    """Reads the header: the grid on which a prediction for this file is written."""
    path = Path(path)
    with opened(path) as file:
        return parse_header(file.header, path, paired=file.paired)


def write_label(path, array: np.ndarray, source: SourceGrid) -> None:
    """Writes class ids (D, H, W) uint8 on the source grid, with its affine, qform and sform."""
    _write(path, label_image(array, source))


def write_map(path, array: np.ndarray, source: SourceGrid) -> None:
    """Writes numbers (D, H, W) or (D, H, W, K) as float32 on the source grid, K as its 4th axis."""
    _write(path, _image(array.astype(np.float32), source))


def _write(path, image: nib.Nifti1Image) -> None:
    if not str(path).endswith((".nii", ".nii.gz")):
        raise UserError(f"cannot write {path}: name the file .nii or .nii.gz")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def label_image(array: np.ndarray, source: SourceGrid) -> nib.Nifti1Image:
    """Returns class ids (D, H, W) uint8 as an image on the source grid; see `write_label`."""
    if array.dtype != np.uint8 or array.shape != source.display_shape:
        raise ValueError(
            f"need uint8 {source.display_shape}, got {array.dtype} {tuple(array.shape)}"
        )
    return _image(array, source)


def _image(array: np.ndarray, source: SourceGrid) -> nib.Nifti1Image:
    header = source.header.copy()
    header.set_data_dtype(array.dtype)
    for field in ("scl_slope", "scl_inter", "cal_min", "cal_max", "vox_offset"):
        header[field] = 0
    header["descrip"] = b""
    header.set_intent("none")
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    stored = to_source(array, source)
    if array.ndim == 3:  # the header may have more axes, of length one
        stored = stored.reshape(source.header.get_data_shape())
    return kind(stored, source.affine, header)


def to_volume(raw: np.ndarray, grid: SourceGrid, dtype) -> Volume:
    """Scales stored voxels to float32 intensities or int32 label ids in display orientation."""
    array = np.ascontiguousarray(to_display(_decode(raw, grid, dtype), grid))
    return Volume(array, grid.spacing, grid)


def from_nibabel(image: nib.Nifti1Image) -> Volume:
    """Returns the `Volume` that is read from the image's file, with the same checks.

    An affine that was changed after loading counts, as it does when nibabel saves the image.
    """
    path = Path(image.get_filename() or "the nibabel image")
    # A new image, because nibabel then updates the header to match affine and shape.
    header = type(image)(image.dataobj, image.affine, image.header).header
    header.set_data_dtype(image.dataobj.dtype)  # type: ignore[attr-defined]  # nibabel's gap
    header.set_slope_inter(1, 0)  # `dataobj` gives scaled values already
    header["vox_offset"] = header.single_vox_offset
    grid = parse_header(io.BytesIO(header.binaryblock), path)
    with reading_errors(path):
        voxels = np.asanyarray(image.dataobj).reshape(grid.shape[:3])
    return to_volume(voxels, grid, np.float32)


def read_raw(path) -> tuple[np.ndarray, SourceGrid, int]:
    """Returns the stored, unscaled voxels (X, Y, Z), the grid and the number of trailing bytes.

    Reads the file to its end, including the checksum of a gzip, but at most `_MAX_TRAILING` bytes
    past the voxels.
    """
    path = Path(path)
    with opened(path) as file:
        grid = parse_header(file.header, path, paired=file.paired)
        raw = _voxels(file, grid)
        trailing = len(file.voxels.read(_MAX_TRAILING + 1))
        if file.zipped and trailing > _MAX_TRAILING:
            raise BadFile(
                f"{path} inflates past the size its header declares; get a new copy", "trailing"
            )
    return raw, grid, trailing


def _voxels(file: Opened, grid: SourceGrid) -> np.ndarray:
    """Returns the declared voxels (X, Y, Z) in their stored type.

    Headers that declare more than the file can hold are rejected before memory is allocated.
    """
    start, dtype = int(grid.header["vox_offset"]), grid.header.get_data_dtype()
    start -= grid.header.single_vox_offset if file.paired else 0
    room = file.size * _MAX_PACKING if file.zipped else file.size
    need = math.prod(grid.shape) * dtype.itemsize
    if start + need > room:
        raise BadFile(
            f"{grid.path} is cut off after at most {max(room - start, 0)} of {need} bytes of "
            "voxels; get a new copy",
            "damaged",
        )
    count = math.prod(grid.shape) if file.voxels.seek(start) == start else 0
    raw, done = read_numbers(file.voxels, count, dtype)
    if done < need:
        raise BadFile(
            f"{grid.path} is cut off after {done} of {need} bytes of voxels; get a new copy",
            "damaged",
        )
    return raw.reshape(grid.shape[:3], order="F")


def _decode(raw: np.ndarray, grid: SourceGrid, dtype) -> np.ndarray:
    """Scales and converts slice by slice, which avoids a float64 copy of the volume."""
    slope, inter = scale_of(grid)
    if dtype == np.int32 and (slope, inter) != (1.0, 0.0) and raw.dtype.kind in "iu":
        return _scaled_ids(raw, slope, inter, grid.path)
    out = np.empty(raw.shape, dtype, order="F")
    for z in range(raw.shape[2]):
        slab = raw[..., z]
        if (slope, inter) != (1.0, 0.0):
            slab = slab.astype(np.float64) * slope + inter
        if slab.dtype.kind == "f" and not _finite(slab):
            raise BadFile(
                f"{grid.path} holds NaN or infinite values; replace them first", "not_finite"
            )
        out[..., z] = _as_ids(slab, grid.path) if dtype == np.int32 else slab
    return out


def scale_of(grid: SourceGrid) -> tuple[float, float]:
    """Returns slope and intercept from stored to real values."""
    slope, inter = grid.header.get_slope_inter()
    return (1.0, 0.0) if slope is None else (float(slope), float(inter or 0.0))


def _scaled_ids(raw: np.ndarray, slope: float, inter: float, path: Path) -> np.ndarray:
    """Restores the ids of a label that was saved with a scale factor, as some tools do.

    A stored code maps to the nearest id if it is the only code nearest to that id, which undoes the
    rounding of the program that saved it. Raises `BadFile` otherwise.
    """
    codes = functools.reduce(np.union1d, map(np.unique, raw.T))
    values = codes * np.float64(slope) + inter
    ids = np.rint(values)
    off = np.abs(values - ids)
    room = abs(slope) / 2 * (1 + 1e-6) if abs(slope) < 1 else 0.0
    if off.max() > max(room, 1e-3) or len(np.unique(ids)) < len(ids):
        raise BadFile(
            f"{path} holds {values[off.argmax()]:.6g}, not a label id, by the scale factor "
            f"{slope:.6g} of its header; save label ids as integers without a scale factor",
            "not_integer",
        )
    _check_range(ids, path)
    out = np.empty(raw.shape, np.int32, order="F")
    for z in range(raw.shape[2]):
        out[..., z] = ids[np.searchsorted(codes, raw[..., z])]
    return out


def _finite(slab: np.ndarray) -> bool:
    """Whether float32 can represent all values."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(slab.astype(np.float32, copy=False)).all())


def _as_ids(slab: np.ndarray, path: Path) -> np.ndarray:
    """Returns label ids, also from floats within 1e-3 of an integer."""
    ids = np.rint(slab) if slab.dtype.kind == "f" else slab
    if slab.dtype.kind == "f" and np.abs(slab - ids).max() > 1e-3:
        value = slab.flat[np.abs(slab - ids).argmax()]
        raise BadFile(
            f"{path} holds {value:g}, not a label id; is it an image or a soft mask?", "not_integer"
        )
    _check_range(ids, path)
    return ids


def _check_range(ids: np.ndarray, path: Path) -> None:
    if ids.min() < -(2**31) or ids.max() >= 2**31:
        raise BadFile(
            f"{path} holds label ids beyond 32 bits; renumber its labels", "unknown_label"
        )
