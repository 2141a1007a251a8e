"""TransUNet's slices and volumes: read as cases, scored on a unit grid, hostile files refused."""

import json
import pickle
import sys
import tracemalloc
import warnings
import zipfile

import h5py
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax import verify as program
from pgpsam_jax.data import dataset
from pgpsam_jax.data.io import volumes
from pgpsam_jax.data.io.array_files import ArrayFiles
from pgpsam_jax.data.io.nifti import write_label
from pgpsam_jax.data.io.volumes import read_label
from pgpsam_jax.data.layouts.find import detect, find_cases
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.evaluate import evaluate
from tests.support.layout_data import layout_config, write_transunet
from tests.support.small_run import few_shot_data

pytestmark = pytest.mark.filterwarnings("ignore:The files carry no voxel size")


def by_id(root):
    return {case.case_id: case for case in find_cases("transunet", root)}


def test_cases_of_lists_and_of_folders(tmp_path):
    for lists in (True, False):
        root = tmp_path / str(lists)
        root.mkdir()
        write_transunet(root, lists=lists)
        assert detect(root) == "transunet"
        with pytest.warns(UserWarning, match="no voxel size and no orientation"):
            cases = find_cases("transunet", root)
        assert [(c.case_id, c.part) for c in cases] == [
            ("case0005", "train"),
            ("case0006", "train"),
            ("case0008", "test"),
        ]
        assert len(cases[0].image.files) == 10 and len(cases[2].image.files) == 1
        assert cases[0].image.files[3].name == "case0005_slice003.npz"


def test_arrays_are_the_volumes_they_came_from(tmp_path):
    write_transunet(tmp_path)
    for case in by_id(tmp_path).values():
        image, label = volumes.read_image(case.image), volumes.read_label(case.label)
        assert image.array.shape == label.array.shape == (10, 20, 24)
        assert image.array.dtype == np.float32 and label.array.dtype == np.int32
        assert image.spacing == (1, 1, 1) and image.source.orientation == "LPS"
        assert 0 <= image.array.min() and image.array.max() <= 1
        assert set(np.unique(label.array)) == {0, 1, 6}
        assert volumes.read_grid(case.image).display_shape == image.array.shape
        if case.part == "train":
            stored = np.stack([np.load(file)["image"] for file in case.image.files])
            np.testing.assert_array_equal(image.array, stored)
        write_label(tmp_path / "o.nii.gz", label.array.astype(np.uint8), image.source)
        np.testing.assert_array_equal(read_label(tmp_path / "o.nii.gz").array, label.array)


def test_trained_on_and_evaluated(tmp_path):
    """Few-shot set and evaluation of a configuration, with a predictor that knows the truth."""
    write_transunet(tmp_path)
    config = layout_config(tmp_path, "transunet", data__axis="axial")
    split = dataset.find_split(config.data)
    assert [c.case_id for c in split.train] == ["case0005", "case0006"] and len(split.test) == 1
    data = few_shot_data(config, split, tmp_path / "run")
    assert data.images.shape == (7, 32, 32) and 0.3 < data.images.max() <= 1
    assert set(np.unique(data.labels)) == {0, 1, 2}

    class Known:
        preprocessing, oracle = Preprocessing(32, (0.0, 1.0)), False

        def __call__(self, volume):
            ids = volumes.read_label(split.test[0].label).array
            return split.table.remap(ids, "x")

    options = {"nsd_tolerance_mm": 1.0, "min_pixels": 1, "overlays": True}
    folder = tmp_path / "evaluation"
    summary = evaluate(Known(), split.test, split.table, folder, **options)
    assert "1.0" in json.dumps(summary)
    written = nib.load(folder / "predictions" / "case0008.nii.gz")
    assert written.shape == (24, 20, 10) and written.header.get_zooms() == (1, 1, 1)
    key = few_shot_data(config, split, tmp_path / "run")
    assert key.digest == data.digest
    blank = np.zeros((20, 24), np.float32)
    np.savez(tmp_path / "train_npz" / "case0005_slice000.npz", image=blank, label=blank)
    key = few_shot_data(config, split, tmp_path / "run")
    assert key.digest != data.digest


def test_a_label_table_is_required(tmp_path):
    write_transunet(tmp_path)
    with pytest.raises(UserError, match=r"needs data\.label_table"):
        dataset.find_split(layout_config(tmp_path, "transunet", data__label_table="").data)


LINES = ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "a\tb", "a" * 251, "a\0"]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("file", ["train.txt", "test_vol.txt"])
def test_lists_that_lead_elsewhere(tmp_path, line, file):
    write_transunet(tmp_path)
    path = tmp_path / "lists" / "lists_Synapse" / file
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"line \d+ is .*, not a plain file name"):
        find_cases("transunet", tmp_path)


def test_lists_that_are_amiss(tmp_path):
    write_transunet(tmp_path)
    lists = tmp_path / "lists" / "lists_Synapse"
    train, test = lists / "train.txt", lists / "test_vol.txt"
    before = train.read_text()

    def problem(match, text=before, tests="case0008\n"):
        train.write_text(text)
        test.write_text(tests)
        with pytest.raises(UserError, match=match):
            find_cases("transunet", tmp_path)

    problem("case0005_slice010.npz is in the list but not there", before + "case0005_slice010\n")
    problem("case0009.* is in the list but not there", tests="case0009\n")
    problem("names case0005_slice000 twice", before + "case0005_slice000\n")
    problem("slice 0 of case0005 appears twice", before + "case0005_slice0\n")
    problem("not named CASE_sliceNUMBER", before + "case0005\n")
    problem("case0005 is in the training and the test list, which leaks", tests="case0005\n")
    problem("no cases found", "", "")
    (tmp_path / "lists" / "other").mkdir()
    (tmp_path / "lists" / "other" / "train.txt").write_text(before)
    problem("keep one of these folders")
    with pytest.raises(UserError, match="neither train_npz nor test_vol_h5"):
        find_cases("transunet", tmp_path / "lists")


def test_a_few_shot_list_of_slices(tmp_path):
    """Slices that are left out, as in H-SAM's train_220.txt, are a warning of verify."""
    write_transunet(tmp_path)
    lists = tmp_path / "lists" / "lists_Synapse"
    (lists / "train.txt").write_text("case0005_slice002.npz\ncase0005_slice007.npz\n")
    assert len(by_id(tmp_path)["case0005"].image.files) == 2
    report = program.verify(tmp_path, table=load_label_table(tmp_path / "table.json"))
    assert [f["code"] for f in report["data_set"]] == ["slices"]
    assert report["counts"]["errors"] == 0 and report["files"][0]["shape"] == [2, 20, 24]


def test_verified_without_a_table(tmp_path):
    write_transunet(tmp_path)
    report = program.verify(tmp_path)
    assert [f["code"] for f in report["data_set"]] == ["no_table"]
    assert report["files"][0]["orientation"] is None


def refused(path, match, key="image"):
    for read in (volumes.read_image, volumes.read_grid):
        with pytest.raises(UserError, match=match) as caught:
            read(ArrayFiles((path,), key))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def npz(path, header: bytes, body=b"", name="image.npy"):
    """An .npz with a header of one's own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body
        )
    return path


def head(shape, kind="<f4"):
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()


class Payload:
    def __reduce__(self):
        return (print, ("this code must never run",))


def test_pickles_are_not_opened(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", image=np.array([[Payload()]], object))
    refused(tmp_path / "a.npz", "of type object")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Payload()))
    refused(tmp_path / "b.npz", "damaged or no .npz")
    assert "never run" not in capsys.readouterr().out


def test_arrays_that_lie(tmp_path):
    """Claims of 16 TiB and bombs take no memory."""
    tracemalloc.start()
    refused(npz(tmp_path / "a.npz", head((1 << 20, 1 << 22))), "over the limit|expected one slice")
    refused(npz(tmp_path / "b.npz", head((8192, 8192 * 9))), "over the limit|expected one slice")
    refused(npz(tmp_path / "c.npz", head((-4, 4))), "declares the shape")
    refused(npz(tmp_path / "d.npz", head((4, 4), "<U9")), "of type")
    refused(npz(tmp_path / "e.npz", head((4, 4), "<c8")), "of type")
    refused(npz(tmp_path / "f.npz", head("__import__('os')")), "broken array header")
    refused(npz(tmp_path / "g.npz", b"{'descr': [[[[[[["), "broken array header")
    refused(npz(tmp_path / "h.npz", head((4, 4)), bytes(64), "other.npy"), "no array 'image'")
    for body in (bytes(63), bytes(65), bytes(64 << 20)):
        path = npz(tmp_path / "i.npz", head((4, 4)), body)
        with pytest.raises(UserError, match="not have its declared length"):
            volumes.read_image(ArrayFiles((path,), "image"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 260 << 20  # the bomb's own 64 MiB, made here, in three copies


def test_hdf5_that_lies(tmp_path):
    path = tmp_path / "a.h5"

    def write(make, match, name="image"):
        with h5py.File(path, "w") as file:
            make(file)
        refused(path, match)

    write(lambda f: f.create_dataset("image", (1 << 14, 1 << 14, 1 << 14), "f4"), "over the limit")
    write(lambda f: f.create_dataset("image", (4, 5, 6), "f4", chunks=(1, 5, 6)), "not hold them")
    write(lambda f: f.create_dataset("image", (4, 5, 6), "f4"), "not hold them all")
    write(lambda f: f.create_dataset("image", (64, 65, 66), "f4", chunks=(64, 65, 66)), "not hold")
    write(lambda f: f.create_dataset("image", data=[b"text"]), "of type")
    write(lambda f: f.create_dataset("image", data=np.zeros((4, 5, 6), np.complex64)), "of type")
    write(lambda f: f.create_group("image"), "no plain array")
    write(lambda f: f.create_dataset("label", data=np.zeros((4, 5, 6))), "no array 'image'")
    write(lambda f: f.create_dataset("image", data=np.zeros(4)), "shape")
    write(lambda f: f.create_dataset("image", data=h5py.Empty("f4")), "no plain array")
    write(lambda f: f.__setitem__("image", h5py.ExternalLink("/etc/x.h5", "/image")), "no plain")
    write(lambda f: f.__setitem__("image", h5py.SoftLink("/label")), "no plain array")
    outside = [(str(tmp_path / "secret"), 0, 4 * 120)]
    (tmp_path / "secret").write_bytes(bytes(480))
    write(lambda f: f.create_dataset("image", (4, 5, 6), "f4", external=outside), "other files")
    virtual = h5py.VirtualLayout((4, 5, 6), "f4")
    virtual[:] = h5py.VirtualSource(tmp_path / "b.h5", "image", shape=(4, 5, 6))
    write(lambda f: f.create_virtual_dataset("image", virtual), "other files")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    refused(path, "damaged or no HDF5")
    path.unlink()
    refused(path, "is not a file")


def test_packed_hdf5_is_read(tmp_path):
    array = np.random.default_rng(0).random((4, 5, 6), np.float32)
    for number, options in enumerate(
        ({}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"})
    ):
        path = tmp_path / f"{number}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("image", data=array, **options)
        np.testing.assert_array_equal(volumes.read_image(ArrayFiles((path,), "image")).array, array)


def test_content_is_checked_like_that_of_nifti(tmp_path):
    for name, value, match in (("image", np.nan, "NaN"), ("label", 1.5, "not a label id")):
        path = tmp_path / f"{name}.npz"
        np.savez(path, **{name: np.full((4, 4), value)})
        read = volumes.read_image if name == "image" else volumes.read_label
        with pytest.raises(UserError, match=match):
            read(ArrayFiles((path,), name))
    np.savez(tmp_path / "small.npz", image=np.zeros((4, 5)))
    with pytest.raises(UserError, match=r"small\.npz has image float64 \(4, 5\), its neighbor"):
        np.savez(tmp_path / "image.npz", image=np.zeros((4, 4)))
        volumes.read_image(ArrayFiles((tmp_path / "image.npz", tmp_path / "small.npz"), "image"))


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The bytes of one small file of each kind, and a place to spoil them."""
    folder, array = tmp_path_factory.mktemp("fuzz"), np.arange(12.0).reshape(3, 4)
    np.savez_compressed(folder / "a.npz", image=array)
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("image", data=array[None], chunks=(1, 3, 4), compression="gzip")
    return folder, {kind: (folder / f"a.{kind}").read_bytes() for kind in ("npz", "h5")}


@pytest.mark.parametrize("kind", ["npz", "h5"])
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    keep=st.floats(0.5, 1),
)
@settings(max_examples=100, deadline=None)
def test_any_damage_is_a_user_error_or_a_volume(intact, kind, changes, keep):
    folder, originals = intact
    data = bytearray(originals[kind])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    path = folder / f"spoilt.{kind}"
    path.write_bytes(data[: int(keep * len(data)) if keep < 0.9 else len(data)])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            volume = volumes.read_image(ArrayFiles((path,), "image"))
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert np.isfinite(volume.array).all() and volume.array.ndim == 3


def test_h5py_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.h5 needs h5py: pip install 'pgpsam-jax\[transunet\]'"):
        volumes.read_image(ArrayFiles((tmp_path / "a.h5",), "image"))
