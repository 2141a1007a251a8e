"""NIfTI in and out: one display orientation inside the program, the file's own grid outside.

Inside, a volume is `(D, H, W)`: D inferior to superior, H anterior to posterior, W from the
patient's right to left. A `SourceGrid` remembers how the file stored it, so that a prediction
goes back voxel by voxel. Files are untrusted: sizes are checked before memory is taken, gzip
streams are read to their end (that is where the checksum is) but never past the declared size.
"""

import contextlib
import gzip
import logging
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from pgpsam_jax.data.array_checks import check_size
from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.grid import SourceGrid, to_display, to_source
from pgpsam_jax.errors import UserError
from pgpsam_jax.files import atomic_path

_CHUNK = 16 << 20
_MAX_TRAILING = 1 << 20  # padding tolerated after the voxels before a gzip counts as a bomb
_MAX_OFFSET = 64 << 20  # room for header extensions
_MAX_PACKING = 1032  # bytes that one byte of a deflate stream can stand for: 258 in two bits
_VOXEL_SIZES = (1e-6, 1e6)  # in the file's unit; what is beyond is a broken header
_MAX_POSITION = 1e9
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_QUIET = logging.Logger("nifti header", logging.CRITICAL + 1)  # nibabel reports every small repair


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume in display orientation: array (D, H, W), spacing in mm (D, H, W), source grid."""

    array: np.ndarray
    spacing: tuple[float, float, float]
    source: SourceGrid


def read_image(path) -> Volume:
    """Intensities as float32; a `UserError` for anything but one intact, finite 3-D volume."""
    return _read(path, np.float32)


def read_label(path) -> Volume:
    """Source label ids as int32; floats count as ids when within 1e-3 of an integer."""
    return _read(path, np.int32)


def read_grid(path) -> SourceGrid:
    """Header only: the grid that a prediction for this file has to be written on."""
    path = Path(path)
    with _open(path) as (stream, _):
        return parse_header(stream, path)


def write_label(path, array: np.ndarray, source: SourceGrid) -> None:
    """Write class ids (D, H, W) uint8 on the source's grid; affine, qform and sform unchanged."""
    image = label_image(array, source)
    if not str(path).endswith((".nii", ".nii.gz")):
        raise UserError(f"cannot write {path}: name the file .nii or .nii.gz")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def label_image(array: np.ndarray, source: SourceGrid) -> nib.Nifti1Image:
    """Class ids (D, H, W) uint8 as an image on the source's grid: what `write_label` writes."""
    if array.dtype != np.uint8 or array.shape != source.display_shape:
        raise ValueError(
            f"need uint8 {source.display_shape}, got {array.dtype} {tuple(array.shape)}"
        )
    header = source.header.copy()
    header.set_data_dtype(np.uint8)
    for field in ("scl_slope", "scl_inter", "cal_min", "cal_max", "vox_offset"):
        header[field] = 0
    header["descrip"] = b""
    header.set_intent("none")
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(to_source(array, source).reshape(source.shape), source.affine, header)


def _read(path, dtype) -> Volume:
    raw, grid, _ = read_raw(path)
    return to_volume(raw, grid, dtype)


def to_volume(raw: np.ndarray, grid: SourceGrid, dtype) -> Volume:
    """Stored voxels, scaled, in display orientation: float32 intensities or int32 label ids."""
    array = np.ascontiguousarray(to_display(decode(raw, grid, dtype), grid))
    return Volume(array, grid.spacing, grid)


def read_raw(path) -> tuple[np.ndarray, SourceGrid, int]:
    """Voxels (X, Y, Z) as stored, not scaled, of an intact file; its grid; bytes left over.

    The whole file is read, a gzip to its checksum, but at most `_MAX_TRAILING` bytes too far.
    """
    path = Path(path)
    with _open(path) as (stream, zipped):
        grid = parse_header(stream, path)
        size = path.stat().st_size
        raw = _voxels(stream, grid, size * _MAX_PACKING if zipped else size)
        trailing = len(stream.read(_MAX_TRAILING + 1))
        if zipped and trailing > _MAX_TRAILING:
            raise BadFile(
                f"{path} inflates past the size its header declares; get a new copy", "trailing"
            )
    return raw, grid, trailing


@contextlib.contextmanager
def _open(path: Path):
    """Yield (byte stream, whether it is gzip) of a file whose name says which of both it is."""
    named = path.name.lower().endswith(".gz")
    with told(path), contextlib.ExitStack() as stack:
        if not path.is_file():
            raise BadFile(f"{path} is not a file; check the path", "missing")
        file = stack.enter_context(open(path, "rb"))
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        if named and not zipped:
            raise BadFile(f"{path} is named .gz but is not gzip; rename it or compress it", "name")
        if zipped and not named:
            raise BadFile(
                f"{path} is gzip but is not named .gz; rename it to {path.name}.gz", "name"
            )
        yield (gzip.GzipFile(fileobj=file) if zipped else file), zipped


@contextlib.contextmanager
def told(path: Path):
    """Whatever goes wrong while a file is read becomes one sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFile(
            f"{path} is damaged or cut off ({error}); get a new copy", "damaged"
        ) from error
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}", "unreadable") from error
    except MemoryError as error:
        raise BadFile(
            f"{path} does not fit into memory; crop it, or use a larger machine", "size"
        ) from error


def parse_header(stream, path: Path) -> SourceGrid:
    """Read and check the header; leaves the stream right behind it."""
    start = stream.read(4)
    size = next((n for n in _HEADERS if start in (struct.pack("<i", n), struct.pack(">i", n))), 0)
    block = start + stream.read(max(size - 4, 0))
    if size == 0 or len(block) < size:
        raise BadFile(f"{path} is not a NIfTI file; expected .nii or .nii.gz", "header")
    try:
        header = _HEADERS[size](block, check=False)
        header.check_fix(logger=_QUIET)
        affine = np.asarray(header.get_best_affine(), np.float64)
        header.get_slope_inter()
    except (HeaderDataError, WrapStructError, ValueError) as error:
        raise BadFile(
            f"{path} has a broken NIfTI header ({error}); export it again", "header"
        ) from error
    _check_header(header, path)
    axes, flips = _orientation(affine, path)
    return SourceGrid(path, header, affine, axes, flips)


def _check_header(header, path: Path) -> None:
    """Only one plain 3-D volume of ordinary numbers and of a credible size goes on."""
    if not header["magic"].item().startswith(b"n+"):
        raise BadFile(
            f"{path} is one half of a .hdr/.img pair; convert it to a single .nii.gz", "header"
        )
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) < 3 or min(shape) < 1 or any(n != 1 for n in shape[3:]):
        raise BadFile(f"{path} has shape {shape}; expected one 3-D volume, split it first", "shape")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise BadFile(
            f"{path} holds {dtype} voxels; convert it to plain integers or floats", "dtype"
        )
    check_size(path, shape, dtype.itemsize)
    if not header.sizeof_hdr <= header["vox_offset"] <= _MAX_OFFSET:
        raise BadFile(
            f"{path} puts its voxels at byte {header['vox_offset']}; export it again", "header"
        )


def _orientation(affine: np.ndarray, path: Path):
    """Axis order and flips to display orientation; refuses an affine that has lost an axis."""
    columns = affine[:3, :3]
    with np.errstate(all="ignore"):
        sizes = np.linalg.norm(columns, axis=0)
        volume = abs(np.linalg.det(columns / sizes))
    if not np.isfinite(affine).all() or not volume > 1e-4:
        raise BadFile(f"{path} has a singular affine; repair its sform or qform", "affine")
    low, high = _VOXEL_SIZES
    if sizes.min() < low or sizes.max() > high or np.abs(affine[:3, 3]).max() > _MAX_POSITION:
        raise BadFile(
            f"{path} has voxels of {' x '.join(f'{s:.3g}' for s in sizes)} at a distance of "
            f"{np.abs(affine[:3, 3]).max():.3g}, which cannot be; repair its sform or qform",
            "affine",
        )
    target = nib.orientations.axcodes2ornt(("S", "P", "L"))
    moves = nib.orientations.ornt_transform(nib.io_orientation(affine), target)
    axes = tuple(int(axis) for axis in np.argsort(moves[:, 0]))
    return axes, tuple(bool(moves[axis, 1] < 0) for axis in axes)


def _voxels(stream, grid: SourceGrid, room: int) -> np.ndarray:
    """Exactly the declared voxels, (X, Y, Z) in the file's own type.

    room: bytes that the file can hold at most, unpacked; a claim of more takes no memory.
    """
    start, dtype = int(grid.header["vox_offset"]), grid.header.get_data_dtype()
    need = math.prod(grid.shape) * dtype.itemsize
    if start + need > room:
        raise BadFile(
            f"{grid.path} is cut off after at most {max(room - start, 0)} of {need} bytes of "
            "voxels; get a new copy",
            "damaged",
        )
    raw = np.empty(math.prod(grid.shape), dtype)
    view, done = memoryview(raw.view(np.uint8)), 0
    complete = stream.seek(start) == start
    while complete and done < raw.nbytes:
        count = stream.readinto(view[done : done + _CHUNK])
        done, complete = done + count, count > 0
    if not complete:
        raise BadFile(
            f"{grid.path} is cut off after {done} of {raw.nbytes} bytes of voxels; get a new copy",
            "damaged",
        )
    return raw.reshape(grid.shape[:3], order="F")


def decode(raw: np.ndarray, grid: SourceGrid, dtype) -> np.ndarray:
    """Scale and convert slab by slab, so that no float64 copy of the volume is made."""
    slope, inter = grid.header.get_slope_inter()
    scaled = slope is not None and (slope, inter) != (1.0, 0.0)
    out = np.empty(raw.shape, dtype, order="F")
    for z in range(raw.shape[2]):
        slab = raw[..., z]
        if scaled:
            slab = slab.astype(np.float64) * slope + inter
        if slab.dtype.kind == "f" and not _finite(slab):
            raise BadFile(
                f"{grid.path} holds NaN or infinite values; replace them first", "not_finite"
            )
        out[..., z] = _as_ids(slab, grid.path) if dtype == np.int32 else slab
    return out


def _finite(slab: np.ndarray) -> bool:
    """Whether float32 holds every value."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(slab.astype(np.float32, copy=False)).all())


def _as_ids(slab: np.ndarray, path: Path) -> np.ndarray:
    ids = np.rint(slab) if slab.dtype.kind == "f" else slab
    if slab.dtype.kind == "f" and np.abs(slab - ids).max() > 1e-3:
        value = slab.flat[np.abs(slab - ids).argmax()]
        raise BadFile(
            f"{path} holds {value:g}, not a label id; is it an image or a soft mask?", "not_integer"
        )
    if ids.min() < -(2**31) or ids.max() >= 2**31:
        raise BadFile(
            f"{path} holds label ids beyond 32 bits; renumber its labels", "unknown_label"
        )
    return ids
