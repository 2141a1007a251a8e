"""Headers of NIfTI, safetensors and HDF5 files that lie, or that point elsewhere."""

import json
import struct
import zlib

import h5py
import numpy as np
import pytest

from pgpsam_jax.data.io import hdf5 as module
from pgpsam_jax.data.io.volumes import read_image
from pgpsam_jax.models.sam.weights import read_safetensors
from tests.support.fuzz.nifti import file_of
from tests.support.refusal import image_of, refuse

HEADERS = {  # fields of a NIfTI header: what is said, or "" where it is harmless
    "huge dimensions": ({"dim": (3, 32767, 32767, 32767, 1, 1, 1, 1)}, "over the limit"),
    "negative dimension": ({"dim": (3, 3, -4, 2, 1, 1, 1, 1)}, "shape"),
    "no dimension": ({"dim": (0,) * 8}, "shape"),
    "nine dimensions": ({"dim": (9, 3, 4, 2, 1, 1, 1, 1)}, "broken NIfTI header"),
    "minus one dimensions": ({"dim": (-1, 3, 4, 2, 1, 1, 1, 1)}, "broken NIfTI header|shape"),
    "voxels before the header": ({"vox_offset": 8}, "too low for single file"),
    "voxels at minus one": ({"vox_offset": -1}, "too low for single file"),
    "voxels nowhere": ({"vox_offset": np.nan}, "puts its voxels at byte nan"),
    "voxels at infinity": ({"vox_offset": np.inf}, "puts its voxels at byte inf"),
    "voxels behind the end": ({"vox_offset": 400}, "cut off"),
    "voxels far behind the end": ({"vox_offset": 9e9}, "puts its voxels at byte 8999999488"),
    "unknown type": ({"datatype": 9999}, "broken NIfTI header"),
    "bits": ({"datatype": 1}, "broken NIfTI header"),
    "colors": ({"datatype": 128}, "plain integers or floats"),
    "long double": ({"datatype": 1536}, "broken NIfTI header|plain integers or floats|cut off"),
    "bits per voxel": ({"bitpix": 13}, ""),
    "unknown intent": ({"intent_code": 12345}, ""),
    "scale of NaN": ({"scl_slope": np.nan}, ""),
    "infinite scale": ({"scl_slope": 1, "scl_inter": np.inf}, "broken NIfTI header|infinite"),
    "no voxel size": ({"sform_code": 0, "pixdim": (1, 0, 0, 0, 0, 0, 0, 0)}, ""),
    "tiny voxels": ({"srow_x": (1e-30, 0, 0, 0)}, "which is impossible"),
    "huge voxels": ({"srow_x": (-1e30, 0, 0, 0)}, "which is impossible"),
    "far away": ({"srow_z": (0, 0, 3, 1e30)}, "which is impossible"),
    "half of a pair": ({"magic": b"ni1"}, "one half of a .hdr/.img pair"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_of_nifti_files_that_lie(tmp_path, fault):
    fields, said = HEADERS[fault]
    path = tmp_path / "a.nii"
    path.write_bytes(file_of("i2", **fields))
    if said:
        refuse(read_image, path, said)
    else:
        stored = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
        np.testing.assert_array_equal(np.sort(read_image(path).array, axis=None), stored.ravel())


def test_extensions_of_nifti_files_are_not_followed(tmp_path):
    """The voxels are where the header says, whatever sizes the extensions claim."""
    data = file_of("i2", vox_offset=384)
    expected = None
    for size in (32, 0, -1, 2**31 - 1, 7):
        extension = b"\x01\0\0\0" + struct.pack("<ii", size, 6) + b"x" * 24
        path = tmp_path / f"{size}.nii"
        path.write_bytes(data[:348] + extension + data[352:])
        found = read_image(path).array
        expected = found if expected is None else expected
        np.testing.assert_array_equal(found, expected)


def weights(header, body=b"", length=None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def entry(**change):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change


ONE = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
LIES = {
    "fewer bytes": weights({"a": entry()}, bytes(4)),
    "more bytes": weights({"a": entry()}, bytes(12)),
    "overlap": weights({"a": entry(), "b": entry()}, bytes(8)),
    "gap": weights({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)),
    "negative offset": weights({"a": entry(data_offsets=[-8, 0])}, bytes(8)),
    "backwards": weights({"a": entry(data_offsets=[8, 0])}, bytes(8)),
    "negative shape": weights({"a": entry(shape=[-2])}, bytes(8)),
    "shape and bytes differ": weights({"a": entry(shape=[3])}, bytes(8)),
    "overflow": weights({"a": entry(shape=[1 << 62, 4])}, bytes(8)),
    "beyond 64 bits": weights({"a": entry(shape=[1 << 70])}, bytes(8)),
    "fraction": weights({"a": entry(shape=[2.0])}, bytes(8)),
    "a hundred axes": weights({"a": entry(shape=[1] * 100, data_offsets=[0, 4])}, bytes(4)),
    "empty but huge": weights({"a": entry(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0])}),
    "same key": weights(b"{%s,%s}" % (ONE % (0, 8), ONE % (8, 16)), bytes(16)),
    "no UTF-8": weights(b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "huge header": weights(b"{}", length=1 << 40),
    "longest header": weights(b"{}", length=(1 << 64) - 1),
    "header behind the end": weights(b"{}", length=200),
    "a list": weights(b"[]"),
    "deep": weights(b'{"a":' * 10_000),
    "unknown type": weights({"a": entry(dtype="F99")}, bytes(8)),
    "complex": weights({"a": entry(dtype="C64", shape=[1])}, bytes(8)),
    "metadata of numbers": weights({"__metadata__": {"a": 1}}),
    "nothing": b"",
    "seven bytes": bytes(7),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_of_safetensors_files_that_lie(tmp_path, lie):
    path = tmp_path / "a.safetensors"
    path.write_bytes(LIES[lie])
    refuse(read_safetensors, path, "not a complete safetensors file of ordinary numbers")


def hdf5(path, make):
    with h5py.File(path, "w") as file:
        make(file)
    return path


def links_in_a_ring(file):
    file["image"], file["other"] = h5py.SoftLink("/other"), h5py.SoftLink("/image")


def group_in_itself(file):
    group = file.create_group("image")
    group["image"] = group


def missing_filter(file):
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((4, 5, 6))
    plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())  # Zstandard, a plugin
    space = h5py.h5s.create_simple((4, 5, 6))
    dataset = h5py.h5d.create(file.id, b"image", h5py.h5t.IEEE_F32LE, space, plan)
    dataset.write_direct_chunk((0, 0, 0), bytes(480))


def packed_twice(file):
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((4, 5, 6))
    plan.set_deflate(9)
    plan.set_deflate(9)
    space = h5py.h5s.create_simple((4, 5, 6))
    dataset = h5py.h5d.create(file.id, b"image", h5py.h5t.IEEE_F32LE, space, plan)
    dataset.write_direct_chunk((0, 0, 0), zlib.compress(zlib.compress(bytes(480))))


def strange_type(dtype):
    return lambda file: file.create_dataset("image", (4, 5, 6), dtype)


def virtual(file):
    layout = h5py.VirtualLayout((4, 5, 6), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "image", shape=(4, 5, 6))
    file.create_virtual_dataset("image", layout)


STRANGE = {
    "ring of links": (links_in_a_ring, "no plain array"),
    "group in itself": (group_in_itself, "no plain array"),
    "link outside": (
        lambda f: f.__setitem__("image", h5py.ExternalLink("/etc/hostname", "/image")),
        "no plain array",
    ),
    "missing filter": (missing_filter, "compressed by a plugin"),
    "packed twice": (packed_twice, "compressed by a plugin"),
    "virtual": (virtual, "in other files"),
    "references": (strange_type(h5py.ref_dtype), "of type"),
    "variable length": (strange_type(h5py.vlen_dtype(np.float32)), "of type"),
    "record": (strange_type([("a", "f4"), ("b", "i4")]), "of type"),
    "opaque": (strange_type("V8"), "of type"),
    "arrays": (strange_type("(1000,1000)f4"), "of type|shape"),
    "a billion chunks": (
        lambda f: f.create_dataset("image", (800, 800, 800), "u1", chunks=(1, 1, 1)),
        "does not hold them all",
    ),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_hdf5_that_points_elsewhere_or_is_strange(tmp_path, kind):
    make, said = STRANGE[kind]
    refuse(image_of, hdf5(tmp_path / "a.h5", make), said)


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"compression": "lzf"}])
@pytest.mark.parametrize("more", [{}, {"shuffle": True}, {"fletcher32": True}])
def test_chunks_that_tell_the_truth_are_read(tmp_path, options, more, monkeypatch):
    """Also where every chunk is looked into, and where one does not shrink."""
    rng = np.random.default_rng(0)
    array = np.zeros((6, 40, 50), np.float32)
    array[:3] = rng.random((3, 40, 50), np.float32)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=array, chunks=(1, 40, 50), **options, **more)
    if options["compression"] == "gzip":
        monkeypatch.setattr(module, "_HARMLESS", 0)
    np.testing.assert_array_equal(image_of(path).array, array)
