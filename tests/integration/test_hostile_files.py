"""Files made to harm: no code of theirs runs, and they take no memory, time or place outside.

What each reader says of damaged files is tested with that reader; here are the attacks that go
across readers. Headers that lie, and lists and JSON, have files of their own beside this one.
"""

import gzip
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from pgpsam_jax.data.cache import build_cache
from pgpsam_jax.data.io.volumes import read_image
from pgpsam_jax.data.layouts import label_table
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.models.sam.weights import read_safetensors
from tests.support.fuzz.nifti import file_of
from tests.support.fuzz.torch_file import archive, state, tensor
from tests.support.launcher import environment
from tests.support.optional import torch
from tests.support.places import REPOSITORY
from tests.support.refusal import image_of, refuse
from tests.support.small_run import write_data
from weights_conversion.checkpoint_files import read_checkpoint

MIB = 32  # by which no refused file may raise the peak of memory
SECONDS = 5


class Payload:
    """Makes a folder where it is unpickled by a reader that runs what it is told to."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def legacy_tar(path, payload):
    """torch's first format: a tar of pickles."""
    with tarfile.open(path, "w") as opened:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(payload, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            opened.addfile(entry, io.BytesIO(data))


PAYLOADS = {
    "zip": lambda path, payload: torch.save({"w": torch.ones(2), "x": payload}, path),
    "legacy": lambda path, payload: torch.save(
        {"x": payload}, path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda path, payload: path.write_bytes(pickle.dumps(payload)),
    "text pickle": lambda path, payload: path.write_bytes(pickle.dumps(payload, 0)),
    "tar": legacy_tar,
    "object array": lambda path, payload: np.savez(
        open(path, "wb"), image=np.array([[payload]], object)
    ),
}


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors", "w.npz", "w.h5"])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_no_reader_runs_a_payload(tmp_path, kind, name):
    target, path = tmp_path / "made", tmp_path / name
    PAYLOADS[kind](path, Payload(target))
    for read in (read_checkpoint, read_safetensors, image_of, read_image):
        refuse(read, path)
    assert not target.exists() and os.listdir(tmp_path) == [name]
    loads = pickle.loads if "pickle" in kind else None
    if loads:
        loads(path.read_bytes())
        assert target.exists(), "the payload is real"


def test_a_cache_file_with_a_payload_is_rebuilt(tmp_path):
    root, target = write_data(tmp_path / "data", ("a",)), tmp_path / "made"
    case = Case("a", root / "images" / "a.nii.gz", root / "labels" / "a.nii.gz")
    table = label_table.load_label_table(root / "table.json")
    (cached,) = build_cache([case], table, Preprocessing(16, (-125, 275)), tmp_path / "cache")
    np.savez(cached.file, **{n: np.array([Payload(target)], object) for n in ("meta", "images")})
    with pytest.warns(UserWarning, match="damaged"):
        (again,) = build_cache([case], table, Preprocessing(16, (-125, 275)), tmp_path / "cache")
    assert again.load()[0].shape == (10, 16, 16) and not target.exists()


def deflated(size: int, *first: bytes, window=31) -> bytes:
    """A deflate stream of some bytes and then so many zeros, at 1 : 1000."""
    squeeze, zeros, times = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20), size >> 20
    head = b"".join(map(squeeze.compress, first)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    # Nothing refers back across a full flush: one piece can stand there many times.
    body = squeeze.compress(zeros) + squeeze.flush(zlib.Z_FULL_FLUSH)
    checksum = zlib.crc32 if window == 31 else zlib.adler32
    value = checksum(b"".join(first))
    for _ in range(times):
        value = checksum(zeros, value)
    stream = head + body * times + squeeze.flush()
    if window == 15:
        return b"\x78\xda" + stream + value.to_bytes(4, "big")
    length = sum(map(len, first)) + len(zeros) * times
    ends = value.to_bytes(4, "little") + (length % 2**32).to_bytes(4, "little")
    return b"\x1f\x8b\x08" + bytes(5) + b"\x02\xff" + stream + ends


def test_the_bombs_are_whole_streams():
    """A reader that unpacks them to the end finds no other fault."""
    for window in (15, 31):
        unpacked = zlib.decompress(deflated(3 << 20, b"ab", b"c", window=window), window)
        assert unpacked == b"abc" + bytes(3 << 20)


def npz_of(path, data: bytes, shape):
    """An archive whose one array is a deflate stream that ends `data`."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("image.npy", head + data)


def hdf5_bomb(path, code, pieces=1):
    """A chunk of 480 bytes whose stream holds 288 MiB, or one as large as it says, in LZF."""
    with h5py.File(path, "w") as file:
        if code == "gzip":
            shape, data = (4, 5, 6), deflated(288 << 20, window=15)
        else:
            shape, data = (1, 1 << 13, 1 << 14), bytes(100)
        chunks = {"chunks": shape, "compression": code}
        shape = (shape[0] * pieces, *shape[1:])
        dataset = file.create_dataset("image", shape, "f4", **chunks)
        if code == "lzf":
            data = lzf_zeros(6 << 20)
        for piece in range(pieces):
            dataset.id.write_direct_chunk((piece * chunks["chunks"][0], 0, 0), data)


def lzf_zeros(size: int) -> bytes:
    """An LZF stream of so many bytes: a zero, then copies of 264 of them at a time."""
    return b"\x00\x00" + b"\xe0\xff\x00" * (size // 3)


def many_views(path):
    """A thousand storages that are all the same megabyte of the archive."""
    views = {f"t{i}": tensor(str(i), 1 << 18, 0, (1 << 18,), (1,)) for i in range(1000)}
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("a/data.pkl", state(**views))
        opened.writestr("a/data/0", bytes(1 << 20))
        first = opened.infolist()[1]
        for index in range(1, 1000):
            entry = zipfile.ZipInfo(f"a/data/{index}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(entry, field, getattr(first, field))
            opened.filelist.append(entry)


def sparse(path, head: bytes, size: int):
    path.write_bytes(head)
    os.truncate(path, size)


HEAD_2_GIB = file_of("i2", dim=(3, 1024, 1024, 500, 1, 1, 1, 1))[:352]
BOMBS = {  # name of the file: (reader, how it is made, what is said)
    "claim.nii": ("image", lambda p: p.write_bytes(HEAD_2_GIB), "cut off after at most 0 of"),
    "claim.nii.gz": (
        "image",
        lambda p: p.write_bytes(gzip.compress(HEAD_2_GIB)),
        "cut off after at most",
    ),
    "ten_gib.nii.gz": (
        "image",
        lambda p: p.write_bytes(
            gzip.compress(file_of("f4", dim=(3, 1024, 1024, 2500, 1, 1, 1, 1))[:352])
        ),
        "voxels, 9.8 GiB in memory",
    ),
    "behind.nii.gz": (
        "image",
        lambda p: p.write_bytes(deflated(128 << 20, file_of("i2"))),
        "inflates past the size",
    ),
    "extension.nii.gz": (
        "image",
        lambda p: p.write_bytes(deflated(128 << 20, file_of("i2", vox_offset=6e7)[:352])),
        "inflates past the size",
    ),
    "members.nii.gz": (
        "image",
        lambda p: p.write_bytes(gzip.compress(file_of("i2")) + gzip.compress(b"") * 100_000),
        "accepted",
    ),
    "behind.npz": ("array", lambda p: npz_of(p, bytes(128 << 20), (4, 4)), "its declared length"),
    "claim.npz": ("array", lambda p: npz_of(p, b"", (20000, 20000)), "its declared length"),
    "gzip.h5": ("array", lambda p: hdf5_bomb(p, "gzip"), "unpacks to more than"),
    "lzf.h5": ("array", lambda p: hdf5_bomb(p, "lzf"), "unpacks to more than"),
    "views.pth": ("checkpoint", many_views, "would unpack to 1048576000"),
    "stride.pth": (
        "checkpoint",
        lambda p: p.write_bytes(archive(state(a=tensor(shape=(1 << 40,), strides=(0,))))),
        "would unpack to",
    ),
    "header.safetensors": (
        "safetensors",
        lambda p: sparse(p, (90 << 20).to_bytes(8, "little") + b"{", 1 << 30),
        "not a complete safetensors file",
    ),
    "list.txt": ("few-shot list", lambda p: sparse(p, b"a\t1\n", 10 << 30), "over 64 MiB"),
    "line.txt": (
        "few-shot list",
        lambda p: p.write_bytes(b"a" * (8 << 20)),
        "is not `case_id<TAB>slice`",
    ),
    "table.json": ("label table", lambda p: sparse(p, b"{", 10 << 30), "over 64 MiB"),
    "deep.json": ("label table", lambda p: p.write_bytes(b"[" * (1 << 20)), "nested too deeply"),
    "split.json": ("split", lambda p: p.write_bytes(b'{"a":' * (1 << 20)), "nested too deeply"),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is told by Linux")
def test_small_files_take_no_memory_and_no_time(tmp_path):
    """Measured: 14 MiB at most, but for the header of 90 MiB that safetensors reads; 2 s."""
    for name, (_, make, _) in BOMBS.items():
        make(tmp_path / name)
    asked = json.dumps([[reader, str(tmp_path / name)] for name, (reader, *_) in BOMBS.items()])
    command = [sys.executable, str(REPOSITORY / "tests" / "support" / "bounded.py")]
    options = {"capture_output": True, "text": True, "check": True, "env": environment(1)}
    ended = subprocess.run(command, input=asked, **options)
    for name, (said, mib, seconds) in zip(BOMBS, json.loads(ended.stdout), strict=True):
        assert BOMBS[name][2] in said, (name, said)
        assert mib < MIB + 100 * (name == "header.safetensors"), (name, mib)
        assert seconds < SECONDS, (name, seconds)


def test_names_in_an_archive_lead_nowhere(tmp_path):
    """Nothing is ever unpacked to a file; `..` is just a name."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    path, pickled = inner / "w.pth", state(a=tensor())
    for prefix in ("../../x/", "/etc/", "..\\", "a/../../"):
        with zipfile.ZipFile(path, "w") as opened:
            opened.writestr(prefix + "data.pkl", pickled)
            opened.writestr(prefix + "data/0", bytes(24))
        if prefix.endswith("/"):
            assert read_checkpoint(path).tensors["a"].shape == (2, 3)
        else:
            refuse(read_checkpoint, path, "not a torch checkpoint")
        with zipfile.ZipFile(inner / "w.npz", "w") as opened:
            opened.writestr(f"{prefix}image.npy", b"x")
        refuse(image_of, inner / "w.npz", "no array 'image'")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "w.npz", "w.pth"]


@pytest.mark.parametrize("field", ["file_size", "header_offset", "CRC", "compress_type"])
def test_directories_of_archives_that_lie(tmp_path, field):
    """Every value in the central directory of a zip, for each of its entries."""
    path = tmp_path / "w.pth"
    for index, value in itertools.product(range(2), (1, 25, 1 << 20, (1 << 32) - 2, 8)):
        with zipfile.ZipFile(path, "w") as opened:
            opened.writestr("a/data.pkl", state(a=tensor()))
            opened.writestr("a/data/0", bytes(24))
            if field == "compress_type" and value != 8:
                continue
            setattr(opened.infolist()[index], field, value)
        refuse(read_checkpoint, path)
