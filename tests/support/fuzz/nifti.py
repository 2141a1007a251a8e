"""Fuzz the front door of NIfTI files: any bytes give a finite volume, or a sentence.

An input that starts as gzip is a `.nii.gz`. Any other is read as a `.nii` and, packed, as a
`.nii.gz`: both must say the same. Some of what is read as a label is written and read again.
"""

import gzip
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from tests.support.fuzz.program import Target, main

MODULES = ("pgpsam_jax.data.io.nifti", "pgpsam_jax.data.io.voxel_grid")
GUIDES = ("nibabel.nifti1", "nibabel.wrapstruct", "nibabel.quaternions", "nibabel.analyze")


def file_of(dtype, shape=(3, 4, 2), kind=1, endianness="<", **fields) -> bytes:
    """A small NIfTI file; `fields` are written into the header as they are."""
    import nibabel as nib

    header = (nib.Nifti1Header if kind == 1 else nib.Nifti2Header)(endianness=endianness)
    header.set_data_shape(shape)
    header.set_data_dtype(np.dtype(dtype))
    header.set_sform(np.diag([-2.0, 2, 3, 1]), 1)
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    for name, value in fields.items():
        header[name] = value
    voxels = np.arange(np.prod(shape)).astype(np.dtype(dtype).newbyteorder(endianness))
    extension = bytes(header.single_vox_offset - header.sizeof_hdr)
    return header.binaryblock + extension + voxels.tobytes()


def target() -> Target:
    """Fuzz the readers of NIfTI files (see the module)."""
    from pgpsam_jax.data.io.nifti import write_label
    from pgpsam_jax.data.io.volumes import read_grid, read_image, read_label
    from pgpsam_jax.errors import UserError

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    plain, packed = folder / "input.nii", folder / "input.nii.gz"

    def attempt(read, path):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                return read(path), ""
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error), str(error)
                return None, error.code

    def check(path) -> list:
        image, refusal = attempt(read_image, path)
        grid, _ = attempt(read_grid, path)
        if image is not None:
            assert grid is not None and image.array.shape == grid.display_shape
            assert image.array.dtype == np.float32 and np.isfinite(image.array).all()
            assert np.isfinite(image.spacing).all() and min(image.spacing) > 0, image.spacing
        label, other = attempt(read_label, path)
        assert label is None or (image is not None and label.array.dtype == np.int32)
        if label is not None and label.array.size < 1000 and label.array.sum() % 8 == 0:
            ids = (label.array % 256).astype(np.uint8)
            write_label(folder / "out.nii", ids, label.source)
            again, refused = attempt(read_label, folder / "out.nii")
            assert again is not None, refused
            np.testing.assert_array_equal(again.array, ids)
        return [refusal, other, None if image is None else image.array.tobytes()]

    def run(data: bytes) -> None:
        if data.startswith(b"\x1f\x8b"):
            packed.write_bytes(data)
            check(packed)
            return
        plain.write_bytes(data)
        packed.write_bytes(gzip.compress(data, 1, mtime=0))
        first, second = check(plain), check(packed)
        assert first == second, (first[:2], second[:2])

    types = ("i2", "u1", "f4", "f8", "i8", "u2")
    seeds = [file_of(dtype, scl_slope=1 + (dtype == "u2")) for dtype in types]
    seeds += [file_of("i2", kind=2), file_of("i2", endianness=">"), file_of("f4", (2, 2, 2, 1))]
    seeds += [
        file_of("u1", sform_code=0, qform_code=1, quatern_b=0.5, qoffset_x=3.0),
        file_of("u1", sform_code=0, pixdim=(1, 0.5, 0.5, 2, 0, 0, 0, 0), xyzt_units=3),
        file_of("u1", intent_code=1001, vox_offset=400.0) + bytes(64),
        file_of("u1", magic=b"ni1"),
        file_of("f8", kind=2, endianness=">", sform_code=0, qform_code=1),
        gzip.compress(file_of("i2"), mtime=0),
        gzip.compress(file_of("i2") + bytes(2 << 20), mtime=0),
    ]
    words = [np.float32(value).tobytes() for value in (0, 1, -1, np.nan, np.inf, 1e38, 1e-38)]
    words += [np.int16(value).tobytes() for value in (1, 2, 4, 8, 16, 64, 256, 512, 32767, -1)]
    words += [b"n+1\0", b"ni1\0", b"n+2\0\r\n\x1a\n", b"\x1f\x8b\x08", (540).to_bytes(4, "little")]
    return Target(run, seeds, words, longest=2048)


if __name__ == "__main__":
    sys.exit(main(target, "tests.support.fuzz.nifti", MODULES, GUIDES))
