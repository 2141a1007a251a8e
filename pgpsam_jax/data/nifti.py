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

from pgpsam_jax.errors import UserError
from pgpsam_jax.files import atomic_path

MAX_BYTES = 2 << 30  # a 512 x 512 x 2048 volume in float32; more is taken for a broken header
_CHUNK = 16 << 20
_MAX_TRAILING = 1 << 20  # padding tolerated after the voxels before a gzip counts as a bomb
_MAX_OFFSET = 64 << 20  # room for header extensions
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 1e-3}  # NIfTI code of the spatial unit; 0 means millimetres
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_QUIET = logging.Logger("nifti header", logging.CRITICAL + 1)  # nibabel reports every small repair


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
    for field in ("scl_slope", "scl_inter", "cal_min", "cal_max"):
        header[field] = 0
    header["descrip"] = b""
    header.set_intent("none")
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(to_source(array, source).reshape(source.shape), source.affine, header)


def to_display(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """View of an array on the file's three axes, (X, Y, Z), as (D, H, W)."""
    flip = [d for d in range(3) if source.flips[d]]
    return np.flip(array.transpose(source.axes), flip)


def to_source(array: np.ndarray, source: SourceGrid) -> np.ndarray:
    """Inverse of `to_display`, also a view."""
    flip = [d for d in range(3) if source.flips[d]]
    return np.flip(array, flip).transpose(np.argsort(source.axes))


def _read(path, dtype) -> Volume:
    path = Path(path)
    with _open(path) as (stream, zipped):
        grid = parse_header(stream, path)
        raw = _voxels(stream, grid)
        if zipped and len(stream.read(_MAX_TRAILING + 1)) > _MAX_TRAILING:
            raise UserError(f"{path} inflates past the size its header declares; get a new copy")
    array = np.ascontiguousarray(to_display(decode(raw, grid, dtype), grid))
    return Volume(array, grid.spacing, grid)


@contextlib.contextmanager
def _open(path: Path):
    """Yield (byte stream, whether it is gzip) of a file whose name says which of both it is."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; check the path")
    named = path.name.lower().endswith(".gz")
    with told(path), open(path, "rb") as file:
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        if named and not zipped:
            raise UserError(f"{path} is named .gz but is not gzip; rename it or compress it")
        if zipped and not named:
            raise UserError(f"{path} is gzip but is not named .gz; rename it to {path.name}.gz")
        yield (gzip.GzipFile(fileobj=file) if zipped else file), zipped


@contextlib.contextmanager
def told(path: Path):
    """Whatever goes wrong while a file is read becomes one sentence."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); get a new copy") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_header(stream, path: Path) -> SourceGrid:
    """Read and check the header; leaves the stream right behind it."""
    start = stream.read(4)
    size = next((n for n in _HEADERS if start in (struct.pack("<i", n), struct.pack(">i", n))), 0)
    block = start + stream.read(max(size - 4, 0))
    if size == 0 or len(block) < size:
        raise UserError(f"{path} is not a NIfTI file; expected .nii or .nii.gz")
    try:
        header = _HEADERS[size](block, check=False)
        header.check_fix(logger=_QUIET)
        affine = np.asarray(header.get_best_affine(), np.float64)
        header.get_slope_inter()
    except (HeaderDataError, WrapStructError, ValueError) as error:
        raise UserError(f"{path} has a broken NIfTI header ({error}); export it again") from error
    _check_header(header, path)
    axes, flips = _orientation(affine, path)
    return SourceGrid(path, header, affine, axes, flips)


def _check_header(header, path: Path) -> None:
    """Only one plain 3-D volume of ordinary numbers and of a credible size goes on."""
    if not header["magic"].item().startswith(b"n+"):
        raise UserError(f"{path} is one half of a .hdr/.img pair; convert it to a single .nii.gz")
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) < 3 or min(shape) < 1 or any(n != 1 for n in shape[3:]):
        raise UserError(f"{path} has shape {shape}; expected one 3-D volume, split it first")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UserError(f"{path} holds {dtype} voxels; convert it to plain integers or floats")
    need = math.prod(int(n) for n in shape) * max(dtype.itemsize, 4)
    if need > MAX_BYTES:
        raise UserError(
            f"{path} declares a volume of {need / 2**30:.1f} GiB in memory, over the limit of "
            f"{MAX_BYTES / 2**30:.0f} GiB; check its header or crop it"
        )
    if not header.sizeof_hdr <= header["vox_offset"] <= _MAX_OFFSET:
        raise UserError(f"{path} puts its voxels at byte {header['vox_offset']}; export it again")


def _orientation(affine: np.ndarray, path: Path):
    """Axis order and flips to display orientation; refuses an affine that has lost an axis."""
    columns = affine[:3, :3]
    with np.errstate(all="ignore"):
        volume = abs(np.linalg.det(columns / np.linalg.norm(columns, axis=0)))
    if not np.isfinite(affine).all() or not volume > 1e-4:
        raise UserError(f"{path} has a singular affine; repair its sform or qform")
    target = nib.orientations.axcodes2ornt(("S", "P", "L"))
    moves = nib.orientations.ornt_transform(nib.io_orientation(affine), target)
    axes = tuple(int(axis) for axis in np.argsort(moves[:, 0]))
    return axes, tuple(bool(moves[axis, 1] < 0) for axis in axes)


def _voxels(stream, grid: SourceGrid) -> np.ndarray:
    """Exactly the declared voxels, (X, Y, Z) in the file's own type."""
    skip = int(grid.header["vox_offset"]) - grid.header.sizeof_hdr
    raw = np.empty(math.prod(grid.shape), grid.header.get_data_dtype())
    view, done = memoryview(raw.view(np.uint8)), 0
    complete = len(stream.read(skip)) == skip
    while complete and done < raw.nbytes:
        count = stream.readinto(view[done : done + _CHUNK])
        done, complete = done + count, count > 0
    if not complete:
        raise UserError(
            f"{grid.path} is cut off after {done} of {raw.nbytes} bytes of voxels; get a new copy"
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
            raise UserError(f"{grid.path} holds NaN or infinite values; replace them first")
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
        raise UserError(f"{path} holds {value:g}, not a label id; is it an image or a soft mask?")
    if ids.min() < -(2**31) or ids.max() >= 2**31:
        raise UserError(f"{path} holds label ids beyond 32 bits; renumber its labels")
    return ids
