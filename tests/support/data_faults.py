"""What may be wrong with a file of a data set: how it is done, and what is to be said of it."""

import gzip
import zlib

import nibabel as nib
import numpy as np


def change(path, array=None, affine=None, **header):
    """Save a file again with other voxels, affine or header fields."""
    image = nib.load(path)
    array = np.asarray(image.dataobj) if array is None else array
    fresh = nib.Nifti1Image(array, image.affine if affine is None else affine)
    for field, value in header.items():
        fresh.header[field] = value
    path.write_bytes(gzip.compress(fresh.to_bytes(), mtime=0))


def voxels(path, dtype=np.float32):
    return np.asarray(nib.load(path).dataobj).astype(dtype)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip_checksum(path):
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)


def grow(path, extra):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + extra))


def claim(path):
    """A header of 4 GiB before a kilobyte of voxels."""
    header = nib.load(path).header
    header.set_data_shape((2048, 1024, 1024))
    header["vox_offset"] = 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4 + 1024)))


def bomb(path):
    """A small volume with 64 MiB of zeros behind it, in 64 KiB."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [squeeze.compress(gzip.decompress(path.read_bytes()))]
    parts += [squeeze.compress(bytes(1 << 20)) for _ in range(64)]
    path.write_bytes(b"".join(parts) + squeeze.flush())


def spoiled(value):
    def spoil(path):
        array = voxels(path)
        array[3, 4, 5] = value
        change(path, array)

    return spoil


def moved(path, millimeters=5.0):
    affine = nib.load(path).affine.copy()
    affine[0, 3] += millimeters
    change(path, affine=affine)


def two_affines(path):
    image = nib.load(path)
    other = image.affine.copy()
    other[2, 3] += 3
    fresh = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    fresh.set_sform(image.affine, 1)
    fresh.set_qform(other, 1)
    path.write_bytes(gzip.compress(fresh.to_bytes()))


def sheared(path):
    affine = nib.load(path).affine.copy()
    affine[0, 1] = 0.4
    change(path, affine=affine)


FAULTS = {  # (file, what is done to it, level, code, what the sentence says)
    "cut off": ("images", cut, "error", "damaged", "get a new copy"),
    "checksum": ("labels", flip_checksum, "error", "damaged", "CRC"),
    "garbage": ("images", lambda p: p.write_bytes(p.read_bytes() + b"xy"), "error", "damaged", ""),
    "not gzip": ("images", lambda p: p.write_bytes(b"x" * 400), "error", "name", "not gzip"),
    "claim": ("images", claim, "error", "size", "8.0 GiB"),
    "bomb": ("labels", bomb, "error", "trailing", "past the size"),
    "padding": ("images", lambda p: grow(p, bytes(300)), "warning", "trailing", "300 bytes"),
    "4-D": (
        "images",
        lambda p: change(p, np.stack([voxels(p)] * 2, -1)),
        *("error", "shape", "3-D"),
    ),
    "NaN": ("images", spoiled(np.nan), "error", "not_finite", "NaN"),
    "Inf": ("labels", spoiled(np.inf), "error", "not_finite", "infinite"),
    "soft": ("labels", spoiled(0.5), "error", "not_integer", "holds 0.5"),
    "shape": (
        "labels",
        lambda p: change(p, voxels(p)[:, :, :-1]),
        *("error", "shape_mismatch", "(9, 20, 24)"),
    ),
    "moved": ("labels", moved, "warning", "affine_mismatch", "up to 5.00 mm"),
    "spacing": (
        "labels",
        lambda p: change(p, affine=nib.load(p).affine @ np.diag([1, 1, 1.01, 1])),
        *("warning", "affine_mismatch", "4.04 x 2 x 1.5 mm"),
    ),
    "two affines": ("images", two_affines, "warning", "two_affines", "3.00 mm"),
    "shear": ("labels", sheared, "warning", "shear", "degrees"),
    "metal": ("images", spoiled(9000), "warning", "intensity", "9000"),
    "constant": (
        "images",
        lambda p: change(p, np.full((24, 20, 10), 7, np.int16)),
        *("warning", "constant", "value 7"),
    ),
    "empty": ("labels", lambda p: change(p, 0 * voxels(p)), "warning", "empty", "background"),
    "absent": (
        "labels",
        lambda p: change(p, np.where(voxels(p) == 6, 6, 0).astype(np.int16)),
        *("warning", "absent", "has no spleen"),
    ),
    "singular": (
        "images",
        lambda p: p.write_bytes(gzip.compress(_singular(p))),
        *("error", "affine", "singular"),
    ),
    "no file": ("labels", lambda p: p.unlink(), "error", "missing_pair", "label of b is missing"),
}


def _singular(path):
    image = nib.Nifti1Image(np.asarray(nib.load(path).dataobj), nib.load(path).affine)
    image.set_sform(image.affine, 1)
    data = bytearray(image.to_bytes())
    data[280:296] = data[296:312]  # srow_x becomes srow_y
    return bytes(data)
