"""Parses and validates NIfTI headers, which are untrusted."""

import logging
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.io.array_checks import check_size
from pgpsam_jax.data.io.voxel_grid import SourceGrid

_MAX_OFFSET = 64 << 20  # room for header extensions
_VOXEL_SIZES = (1e-6, 1e6)  # in the unit of the file; others suggest a broken header
_MAX_POSITION = 1e9
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_QUIET = logging.Logger("nifti header", logging.CRITICAL + 1)  # nibabel reports every small repair


def parse_header(stream, path: Path, *, paired: bool = False) -> SourceGrid:
    """Reads and checks a header; leaves the stream right behind it.

    Args:
        stream: binary file object.
        path: for error messages.
        paired: whether this is the `.hdr` of a pair, which is converted to a single-file header.

    Raises:
        BadFile: anything but one plain volume or slice of a plausible size.
    """
    start = stream.read(4)
    size = next((n for n in _HEADERS if start in (struct.pack("<i", n), struct.pack(">i", n))), 0)
    block = start + stream.read(max(size - 4, 0))
    if size == 0 or len(block) < size:
        raise BadFile(f"{path} is not a NIfTI file; expected .nii or .nii.gz", "header")
    try:
        header = _HEADERS[size](block, check=False)
        if paired:
            _join(header, path)
        header.check_fix(logger=_QUIET)
        affine = np.asarray(header.get_best_affine(), np.float64)
        header.get_slope_inter()
    except (HeaderDataError, WrapStructError, ValueError) as error:
        raise BadFile(
            f"{path} has a broken NIfTI header ({error}); export it again", "header"
        ) from error
    _check_header(header, path)
    if len(header.get_data_shape()) == 2:
        affine = _with_normal(affine)
    _check_affine(affine, path)
    return SourceGrid.of(path, header, affine)


def _join(header, path: Path) -> None:
    """Converts the header of a pair to that of a single file."""
    magic = header["magic"].item()
    if not magic.startswith((b"ni", b"n+")):
        raise BadFile(
            f"{path} belongs to an Analyze 7.5 pair, which does not say where the patient's right "
            "and left are; export it again as NIfTI from its source",
            "header",
        )
    if magic.startswith(b"n+"):
        raise BadFile(
            f"{path} is named like a .hdr/.img pair but its header is that of a single file; "
            "rename the file with the voxels to .nii",
            "header",
        )
    header["magic"] = header.single_magic
    header["vox_offset"] += header.single_vox_offset


def _check_header(header, path: Path) -> None:
    """Checks for one plain 3-D volume of integers or floats and of a plausible size."""
    if not header["magic"].item().startswith(b"n+"):
        raise BadFile(
            f"{path} is one half of a .hdr/.img pair; convert it to a single .nii.gz", "header"
        )
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) < 2 or min(shape) < 1 or any(n != 1 for n in shape[3:]):
        raise BadFile(
            f"{path} has shape {shape}; expected one slice or one 3-D volume, split it first",
            "shape",
        )
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise BadFile(
            f"{path} holds {dtype} voxels; convert it to plain integers or floats", "dtype"
        )
    check_size(path, shape, dtype.itemsize)
    if not header.sizeof_hdr <= header["vox_offset"] <= _MAX_OFFSET:
        raise BadFile(
            f"{path} puts its voxels at byte {header['vox_offset']}; export it again", "header"
        )


def _with_normal(affine: np.ndarray) -> np.ndarray:
    """Gives the third axis of a single slice a length if it has none."""
    first, second, third = affine[:3, :3].T
    normal = np.cross(first, second)
    if np.any(third) or not np.any(normal):
        return affine
    affine = affine.copy()
    affine[:3, 2] = normal / np.linalg.norm(normal)
    return affine


def _check_affine(affine: np.ndarray, path: Path) -> None:
    """Checks that the affine is regular and plausible for a body."""
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
            f"{np.abs(affine[:3, 3]).max():.3g}, which is impossible; repair its sform or qform",
            "affine",
        )
