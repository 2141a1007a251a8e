"""Label tables, layouts and splits, slice geometry, and the cache."""

import hashlib
import itertools
import json
import math
import os
import warnings

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
import torch
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.data.cache import build_cache, gather_slices, read_case
from pgpsam_jax.data.geometry import Fit, logits_to_native, to_model
from pgpsam_jax.data.labels import SYNAPSE8, LabelTable, load_label_table
from pgpsam_jax.data.layouts import (
    BTCV_TEST,
    BTCV_TRAIN,
    Case,
    find_cases,
    safe_case_id,
    split_cases,
)
from pgpsam_jax.errors import UserError

TOTAL = {  # shared/data/README.md: class -> (id in seg104, voxels)
    "spleen": (1, 9677),
    "right_kidney": (2, 6993),
    "left_kidney": (3, 5144),
    "gallbladder": (4, 1300),
    "liver": (5, 41602),
    "stomach": (6, 4977),
    "aorta": (7, 1786),
    "pancreas": (10, 818),
}
TOTAL_TABLE = LabelTable.from_json(
    {
        "classes": [{"name": name, "source": [i]} for name, (i, _) in TOTAL.items()],
        "other": "background",
    }
)
PAIR = LabelTable(("background", "a", "b"), {1: 1, 2: 1, 5: 2})


# --- label tables ---------------------------------------------------------------------------


def test_synapse_table_is_the_published_remap():
    remap = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 0, 6: 5, 7: 6, 8: 7, 9: 0, 10: 0, 11: 8, 12: 0, 13: 0}
    ids = np.arange(14, dtype=np.int32)
    assert SYNAPSE8.remap(ids, "x").tolist() == [remap[i] for i in ids]
    assert SYNAPSE8.num_classes == 9 and SYNAPSE8.names[8] == "pancreas"


@given(st.permutations(range(1, 9)), st.booleans())
def test_remap_is_not_in_place_chaining(order, other):
    """Tables that swap ids, where key-by-key assignment maps some voxels twice."""
    names = ("background", *(f"c{k}" for k in range(1, 9)))
    table = LabelTable(
        names, {s: k for k, s in enumerate(order, 1)}, ("error", "background")[other]
    )
    ids = np.array([0, *order, *order[::-1]], np.int32).reshape(1, -1)
    before = ids.copy()
    result = table.remap(ids, "x")
    assert result.dtype == np.uint8 and result.tolist() == [[0, *range(1, 9), *range(8, 0, -1)]]
    np.testing.assert_array_equal(ids, before)


def test_unknown_values():
    ids = np.array([[0, 1, 3], [-4, 70000, 5]], np.int32)
    with pytest.raises(UserError, match=r"seg\.nii holds .*\(-4, 3, 70000\).*other"):
        PAIR.remap(ids, "seg.nii")
    lenient = LabelTable(PAIR.names, PAIR.source_to_class, "background")
    assert lenient.remap(ids, "x").tolist() == [[0, 1, 0], [0, 0, 2]]
    assert lenient.remap(ids[:0], "x").shape == (0, 3)


def test_table_json_round_trip(tmp_path):
    path = tmp_path / "labels.json"
    for table in (SYNAPSE8, PAIR, TOTAL_TABLE):
        path.write_text(json.dumps(table.to_json()))
        assert load_label_table(path) == table
    assert TOTAL_TABLE.to_json()["classes"][7] == {"name": "pancreas", "source": [10]}


def one(**entry):
    return {"classes": [{"name": "a", "source": [1]}, entry]}


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "expected an object"),
        ({"classes": {}}, "'classes' must be a list"),
        ({"classes": []}, "1 to 254 named classes"),
        ({"labels": []}, "unknown key 'labels'"),
        (one(name="a", source=[2]), "names must differ"),
        (one(name="background", source=[2]), "names must differ"),
        (one(name="b", source=[1]), "source id 1 of class 'b'"),
        (one(name="b", source=[2, 2]), "source id 2 of class 'b'"),
        (one(name="b", source=[0]), "source id 0 of class 'b'"),
        (one(name="b", source=["2"]), "source id '2' of class 'b'"),
        (one(name="b", source=[True]), "source id True of class 'b'"),
        (one(name="b", source=[2.0]), "source id 2.0 of class 'b'"),
        (one(name="b", source=[-1]), "must be integers in 0..65535"),
        (one(name="b", source=2), "'source' must be a list"),
        (one(name="b", source=[]), "no source id for b"),
        (one(name="", source=[2]), "every class needs a name"),
        (one(name="b", source=[2], color="red"), "unknown key 'color'"),
        (one(name="b", source=[2]) | {"other": "ignore"}, '"other" must be'),
        (one(name="b", source=[2]) | {"background": [2]}, "source id 2 of class 'b'"),
    ],
)
def test_bad_tables(tmp_path, value, message):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as caught:
        load_label_table(path)
    assert str(path) in str(caught.value)


def test_table_file_problems(tmp_path):
    with pytest.raises(UserError, match="not found"):
        load_label_table(tmp_path / "none.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_label_table(tmp_path / "t.json")


# --- layouts --------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def btcv_names(ids, kinds=("img", "label")):
    return [f"RawData/Training/{k}/{k}{i:04d}.nii.gz" for k in kinds for i in ids]


def test_btcv_from_every_entry_folder(tmp_path):
    touch(tmp_path / "Abdomen", *btcv_names([40, 1, 22]), "RawData/Training/img/._img0001.nii.gz")
    for root in ("Abdomen", "Abdomen/RawData", "Abdomen/RawData/Training", "."):
        cases = find_cases("btcv", tmp_path / root)
        assert [case.case_id for case in cases] == ["0001", "0022", "0040"]
        assert [case.image.name for case in cases][1] == "img0022.nii.gz"
        assert [case.label.name for case in cases][1] == "label0022.nii.gz"


def test_btcv_problems(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: .*img0001.*syn3193805.*registration"):
        find_cases("btcv", tmp_path / "none")
    with pytest.raises(UserError, match=r"no img folder .*syn3193805"):
        find_cases("btcv", tmp_path)
    touch(tmp_path, *btcv_names([1, 2, 3], ["img"]), *btcv_names([2, 9], ["label"]))
    with pytest.raises(UserError, match="label of 0001, label of 0003, image of 0009"):
        find_cases("btcv", tmp_path)
    touch(tmp_path / "x", *btcv_names([1, 2]), "RawData/Training/img/img0002.nii")
    with pytest.raises(UserError, match="several files for case 0002"):
        find_cases("btcv", tmp_path / "x")
    with pytest.raises(UserError, match="unknown data layout 'nnunet'"):
        find_cases("nnunet", tmp_path)


def test_pairs_match_by_id_not_by_position(tmp_path):
    touch(tmp_path, "im/b b_0000.nii.gz", "im/a_0000.nii.gz", "im/.c_0000.nii.gz", "lab/a.nii.gz")
    with pytest.raises(UserError, match=r"missing in .*: label of b_b;"):
        find_cases("pairs", tmp_path, "im/*_0000.nii.gz", "lab/*.nii.gz")
    touch(tmp_path, "lab/b b.nii.gz")
    cases = find_cases("pairs", tmp_path, "im/*_0000.nii.gz", "lab/*.nii.gz")
    assert [(c.case_id, c.image.name, c.label.name) for c in cases] == [
        ("a", "a_0000.nii.gz", "a.nii.gz"),
        ("b_b", "b b_0000.nii.gz", "b b.nii.gz"),
    ]
    touch(tmp_path, "s/p1/t1.nii.gz", "s/p1/seg.nii.gz", "s/p2/t1.nii.gz", "s/p2/seg.nii.gz")
    cases = find_cases("pairs", tmp_path, "s/*/t1.nii.gz", "s/*/seg.nii.gz")
    assert [(c.case_id, c.label.parent.name) for c in cases] == [("p1", "p1"), ("p2", "p2")]
    cases = find_cases("pairs", tmp_path, "s/*/t1.nii.gz")
    assert [(c.case_id, c.label) for c in cases] == [("p1", None), ("p2", None)]


def test_pairs_single_case(tmp_path, monkeypatch):
    touch(tmp_path / "abdomen", "ct.nii.gz", "seg.nii.gz")
    expected = Case("abdomen", tmp_path / "abdomen/ct.nii.gz", tmp_path / "abdomen/seg.nii.gz")
    assert find_cases("pairs", tmp_path / "abdomen", "ct.nii.gz", "seg.nii.gz") == [expected]
    monkeypatch.chdir(tmp_path / "abdomen")
    assert find_cases("pairs", ".", "ct.nii.gz", "seg.nii.gz")[0].case_id == "abdomen"
    with pytest.raises(UserError, match="label of abdomen"):
        find_cases("pairs", ".", "ct.nii.gz", "none.nii.gz")


@pytest.mark.parametrize(
    "globs, message",
    [
        ((None, None), "needs an image_glob"),
        (("a/*.nii", "b.nii"), "must both hold one"),
        (("*/*.nii", "b/*.nii"), "at most one"),
        (("**/a.nii", "b/*.nii"), "at most one"),
        (("../*.nii", "b/*.nii"), "without"),
        (("/*.nii", "b/*.nii"), "relative"),
        (("im?/*.nii", "b/*.nii"), "at most one"),
        (("x/*.nii", "b/*.nii"), "no images found"),
    ],
)
def test_pairs_problems(tmp_path, globs, message):
    with pytest.raises(UserError, match=message):
        find_cases("pairs", tmp_path, *globs)
    with pytest.raises(UserError, match=r"needs an image_glob|does not exist"):
        find_cases("pairs", tmp_path / "none", *globs)


@given(st.text(max_size=30))
def test_case_ids_are_safe(text):
    try:
        case_id = safe_case_id(text)
    except UserError:
        assert not text.strip(".")
    else:
        assert set(case_id) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
        )
        assert not case_id.startswith(".")


def cases_of(ids):
    return [Case(str(i), f"{i}.nii", f"{i}-seg.nii") for i in ids]


def ids_of(cases):
    return [case.case_id for case in cases]


def test_btcv_split():
    ids = [f"{i:04d}" for i in (*range(1, 11), *range(21, 41))]
    train, test = split_cases(cases_of(ids), "btcv_18_12")
    assert [int(i) for i in ids_of(train)] == list(BTCV_TRAIN) and len(train) == 18
    assert [int(i) for i in ids_of(test)] == list(BTCV_TEST) and len(test) == 12
    assert sorted(ids_of(train) + ids_of(test)) == ids
    with pytest.raises(UserError, match="not in the data: 40, 5"):
        split_cases(cases_of(set(ids) - {"0005", "0040"}), "btcv_18_12")


def test_file_split(tmp_path):
    file = tmp_path / "split.json"

    def split(value):
        file.write_text(json.dumps(value))
        return split_cases(cases_of(["a", "b", "0007"]), "file", file=file)

    train, test = split({"train": [7, "a"], "test": ["b"]})
    assert (ids_of(train), ids_of(test)) == (["0007", "a"], ["b"])
    with pytest.raises(UserError, match="not in the data: c"):
        split({"train": ["a"], "test": ["c"]})
    with pytest.raises(UserError, match="twice, which would leak: 7"):
        split({"train": ["a", 7], "test": ["0007"]})
    with pytest.raises(UserError, match="twice"):
        split({"train": ["a", "a"], "test": ["b"]})
    for bad in (
        [],
        {"train": ["a"]},
        {"train": ["a"], "test": []},
        {"train": "a", "test": ["b"]},
        {"train": ["a"], "test": [None]},
        {"train": ["a"], "test": ["b"], "val": []},
    ):
        with pytest.raises(UserError, match="must be"):
            split(bad)
    with pytest.raises(UserError, match="cannot be read"):
        split_cases(cases_of("ab"), "file", file=tmp_path / "none.json")
    with pytest.raises(UserError, match="leading zeros"):
        split_cases(cases_of(["1", "01"]), "fraction", test_fraction=0.5)


@given(st.integers(2, 20), st.floats(0.01, 0.99), st.integers(0, 9))
def test_fraction_split(count, fraction, seed):
    cases = cases_of(range(count))
    train, test = split_cases(cases, "fraction", test_fraction=fraction, seed=seed)
    assert sorted(ids_of(train + test)) == sorted(ids_of(cases)) and train and test
    assert len(test) == min(max(round(fraction * count), 1), count - 1)
    again = split_cases(cases[::-1], "fraction", test_fraction=fraction, seed=seed)
    assert again == (train, test)


def test_other_splits():
    cases = cases_of("abcdefghij")
    drawn = {
        tuple(ids_of(split_cases(cases, "fraction", test_fraction=0.3, seed=s)[1]))
        for s in range(5)
    }
    assert len(drawn) > 1
    assert split_cases(cases, "within_volume") == (cases, cases)
    for fraction in (None, 0, 1, 2):
        with pytest.raises(UserError, match="0 < test_fraction < 1"):
            split_cases(cases, "fraction", test_fraction=fraction)
    with pytest.raises(UserError, match="within_volume"):
        split_cases(cases[:1], "fraction", test_fraction=0.5)
    with pytest.raises(UserError, match="unknown split"):
        split_cases(cases, "random")


# --- geometry -------------------------------------------------------------------------------


@given(st.integers(1, 600), st.integers(1, 600), st.integers(16, 1024))
def test_fit_is_centred_and_fills_the_longer_side(height, width, size):
    fit = Fit.of((height, width), size)
    assert max(fit.height, fit.width) == size
    exact = (height * size / max(height, width), width * size / max(height, width))
    for side, wanted, start in zip(
        (fit.height, fit.width), exact, (fit.top, fit.left), strict=True
    ):
        assert 1 <= side <= size and abs(side - max(wanted, 1)) <= 0.5
        assert 0 <= (size - side) - 2 * start <= 1


@pytest.mark.parametrize("shape", [(20, 31), (64, 64), (90, 40), (200, 130), (7, 300)])
def test_images_match_jax_resize(shape):
    images = np.random.default_rng(0).random((3, *shape), np.float32)
    fit = Fit.of(shape, 64)
    out = to_model(images, fit, order=1)
    inside = out[:, fit.top : fit.top + fit.height, fit.left : fit.left + fit.width]
    oracle = jax.image.resize(images, (3, fit.height, fit.width), "linear", antialias=True)
    np.testing.assert_allclose(inside, oracle, atol=2e-6)
    assert out.dtype == np.float32 and out.sum() == pytest.approx(inside.sum(), rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 31), (64, 64), (90, 40), (200, 130)])
def test_labels_take_the_nearest_pixel(shape):
    labels = np.random.default_rng(0).integers(0, 9, (2, *shape)).astype(np.uint8)
    fit = Fit.of(shape, 64)
    out = to_model(labels, fit, order=0)
    expected = np.zeros((2, 64, 64), np.uint8)
    for i in range(fit.height):
        for j in range(fit.width):
            y = math.floor((i + 0.5) * shape[0] / fit.height)
            x = math.floor((j + 0.5) * shape[1] / fit.width)
            expected[:, fit.top + i, fit.left + j] = labels[:, y, x]
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "shape,h", [((64, 64), 16), ((64, 64), 64), ((50, 64), 64), ((150, 300), 32)]
)
def test_logits_match_torch_interpolate(shape, h):
    """Crop, then torch's half-pixel bilinear (align_corners False), where the crop is whole."""
    fit = Fit.of(shape, 64)
    logits = np.random.default_rng(1).normal(size=(2, h, h, 3)).astype(np.float32)
    rows = slice(fit.top * h // 64, (fit.top + fit.height) * h // 64)
    assert fit.top * h % 64 == 0 and fit.height * h % 64 == 0 and fit.width == 64
    cropped = torch.from_numpy(logits[:, rows].transpose(0, 3, 1, 2).copy())
    oracle = torch.nn.functional.interpolate(cropped, shape, mode="bilinear", align_corners=False)
    out = jax.jit(lambda x: logits_to_native(x, fit, shape))(logits)
    np.testing.assert_allclose(out, oracle.numpy().transpose(0, 2, 3, 1), atol=2e-5)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize(
    "shape,size", [((101, 122), 256), ((150, 67), 48), ((23, 90), 92), ((80, 80), 80)]
)
def test_logits_keep_linear_ramps(shape, size, stride):
    """A ramp over the input comes back as that ramp at the native pixel centres, at any stride."""
    fit = Fit.of(shape, size)
    centres = (np.arange(size // stride) + 0.5) * stride
    y, x = np.meshgrid(centres, centres, indexing="ij")
    out = np.asarray(logits_to_native(jnp.stack([y, x], -1)[None], fit, shape))[0]
    sides = [(fit.top, fit.height), (fit.left, fit.width)]
    for axis, (start, length) in enumerate(sides):
        wanted = start + (np.arange(shape[axis]) + 0.5) * length / shape[axis]
        got = out[..., axis].mean(axis=1 - axis)
        free = (wanted >= start + 1.5 * stride) & (wanted <= start + length - 1.5 * stride)
        np.testing.assert_allclose(got[free], wanted[free], atol=1e-3)


def test_padding_never_leaks_into_native_pixels():
    fit = Fit.of((37, 101), 64)
    for h in (16, 64):
        logits = np.full((1, h, h, 1), np.nan, np.float32)
        first, last = math.ceil(fit.top * h / 64), (fit.top + fit.height) * h // 64
        logits[:, first:last] = 1
        weighted = jnp.where(jnp.isnan(logits), 1e9, logits)
        np.testing.assert_allclose(logits_to_native(weighted, fit, (37, 101)), 1, atol=1e-6)


def dice(a, b):
    return 2 * np.logical_and(a, b).sum() / (a.sum() + b.sum())


# (native shape, input side): enlarged, shrunk twofold, wide, shrunk, the same size.
GRIDS = [
    ((101, 122), 256),
    ((300, 211), 150),
    ((64, 200), 200),
    ((250, 180), 160),
    ((128, 128), 128),
]


@given(st.integers(0, 10**6), st.sampled_from(GRIDS))
@settings(max_examples=60, deadline=None)
def test_label_round_trip(seed, grid):
    """Native -> input -> one-hot logits -> native; the blobs keep Dice > 0.97."""
    (height, width), size = grid
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    radii = rng.uniform(0.25, 0.45, 2) * (height, width)
    centre = np.array([height, width]) * rng.uniform(0.45, 0.55, 2)
    blob = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    labels = np.where(blob, 1 + (x > centre[1]), 0).astype(np.uint8)[None]
    fit = Fit.of((height, width), size)
    logits = jax.nn.one_hot(to_model(labels, fit, order=0), 3)
    back = np.asarray(logits_to_native(logits, fit, (height, width))).argmax(-1)
    assert min(dice(back == k, labels == k) for k in (1, 2)) > 0.97
    if (fit.height, fit.width) == (height, width):
        np.testing.assert_array_equal(back, labels)


@pytest.mark.parametrize("shape", [(96, 96), (50, 96), (96, 51)])
def test_label_round_trip_is_exact_at_the_same_size(shape):
    labels = np.random.default_rng(0).integers(0, 5, (2, *shape)).astype(np.uint8)
    fit = Fit.of(shape, 96)
    logits = jax.nn.one_hot(to_model(labels, fit, order=0), 5)
    native = logits_to_native(logits, fit, shape)
    np.testing.assert_array_equal(native, jax.nn.one_hot(labels, 5))


# --- cache ----------------------------------------------------------------------------------


def make_case(folder, case_id="p1", shape=(20, 30, 6), affine=None, label_affine=None, flip=False):
    """A CT-like ramp with two organs, LPS by default, and its label file."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.5, -1.5, 4, 1.0]) if affine is None else affine
    rng = np.random.default_rng(shape)
    image = (rng.normal(50, 100, shape)).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[4:9, 5:20, 1:4] = 1
    label[10:16, 6:12, 3:5] = 5
    nib.save(nib.Nifti1Image(image, affine), folder / f"{case_id}.nii.gz")
    if flip:  # the same label, stored with its first axis reversed
        label = label[::-1]
        label_affine = affine @ np.array(
            [[-1, 0, 0, shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
    label_affine = affine if label_affine is None else label_affine
    nib.save(nib.Nifti1Image(label, label_affine), folder / f"{case_id}-seg.nii.gz")
    return Case(case_id, folder / f"{case_id}.nii.gz", folder / f"{case_id}-seg.nii.gz")


WINDOW = (-125, 275)


def test_cache_content(tmp_path):
    case = make_case(tmp_path)
    (cached,) = build_cache([case], PAIR, WINDOW, 64, tmp_path / "cache")
    images, labels = cached.load()
    assert images.dtype == np.float16 and labels.dtype == np.uint8
    assert images.shape == labels.shape == (6, 64, 64) and cached.shape == (6, 30, 20)
    assert images.min() >= 0 and images.max() <= 1

    volume, ids = read_case(case, PAIR)
    window = np.clip((volume.array + 125) / 400, 0, 1)
    fit = Fit.of((30, 20), 64)
    np.testing.assert_allclose(images, to_model(window, fit, 1), atol=6e-4)  # half precision
    np.testing.assert_array_equal(labels, to_model(ids, fit, 0))
    counts = [[(part == k).sum() for k in range(3)] for part in ids]
    np.testing.assert_array_equal(cached.areas, counts)
    assert cached.areas[3].tolist() == [600 - 75 - 36, 75, 36]

    assert cached.spacing == pytest.approx((4, 1.5, 1.5))
    assert cached.meta["orientation"] == "LPS"
    assert cached.meta["sources"]["image"] == hashlib.sha256(case.image.read_bytes()).hexdigest()


def test_cache_is_reused_and_keyed_by_content(tmp_path):
    cases = [make_case(tmp_path, "p1"), make_case(tmp_path, "p2", (20, 30, 7))]
    folder, calls = tmp_path / "cache", []

    def files(**change):
        setting = {"table": PAIR, "window": WINDOW, "image_size": 32} | change
        built = build_cache(cases, cache_dir=folder, progress=lambda *a: calls.append(a), **setting)
        return [case.file for case in built]

    first = files()
    assert calls == [(0, 2, "p1"), (1, 2, "p2")]
    assert [file.name.split("-")[0] for file in first] == ["p1", "p2"]
    stamps = [os.stat(file).st_mtime_ns for file in first]
    assert files() == first and [os.stat(file).st_mtime_ns for file in first] == stamps
    others = [
        files(window=(-100, 275)),
        files(image_size=48),
        files(table=LabelTable(("background", "a", "c"), {1: 1, 2: 1, 5: 2})),
        files(table=LabelTable(PAIR.names, PAIR.source_to_class, "background")),
    ]
    make_case(tmp_path, "p1", affine=np.diag([-1.4, -1.4, 4, 1.0]))
    changed = files()
    assert changed[0] != first[0] and changed[1] == first[1]
    assert len({*first, *changed, *itertools.chain(*others)}) == 11
    assert sorted(folder.iterdir()) == sorted({*first, *changed, *itertools.chain(*others)})


@pytest.mark.parametrize("damage", ["empty", "half", "tail", "flip", "garbage", "other"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    case = make_case(tmp_path)
    (cached,) = build_cache([case], PAIR, WINDOW, 32, tmp_path / "cache")
    images, labels = cached.load()
    data = bytearray(cached.file.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 1
    if damage == "other":
        (other,) = build_cache([case], PAIR, (0, 1), 32, tmp_path / "cache")
        data = other.file.read_bytes()
    cut = {"empty": 0, "half": len(data) // 2, "tail": len(data) - 1}.get(damage, len(data))
    cached.file.write_bytes(b"no zip at all" if damage == "garbage" else data[:cut])
    if damage == "other":
        (again,) = build_cache([case], PAIR, WINDOW, 32, tmp_path / "cache")
    else:
        with pytest.warns(UserWarning, match="damaged .* rebuilding"):
            (again,) = build_cache([case], PAIR, WINDOW, 32, tmp_path / "cache")
    assert again.file == cached.file
    for expected, got in zip((images, labels), again.load(), strict=True):
        np.testing.assert_array_equal(got, expected)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_flipped_byte_of_a_cache_file_is_harmless(tmp_path_factory, data):
    base = tmp_path_factory.getbasetemp() / "flips"
    case = (
        make_case(base, shape=(6, 6, 2))
        if not base.exists()
        else Case("p1", base / "p1.nii.gz", base / "p1-seg.nii.gz")
    )
    table = LabelTable(("background", "a"), {1: 1}, "background")
    (cached,) = build_cache([case], table, WINDOW, 8, base / "cache")
    good, expected = cached.file.read_bytes(), cached.load()
    broken = bytearray(good)
    broken[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    cached.file.write_bytes(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (again,) = build_cache([case], table, WINDOW, 8, base / "cache")
    for wanted, got in zip(expected, again.load(), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_label_stored_in_another_orientation_still_fits(tmp_path, recwarn):
    straight = read_case(make_case(tmp_path / "a"), PAIR)[1]
    flipped = read_case(make_case(tmp_path / "b", flip=True), PAIR)[1]
    np.testing.assert_array_equal(flipped, straight)
    assert not recwarn.list


def test_a_label_that_lost_its_affine_is_paired_by_voxel(tmp_path):
    straight = read_case(make_case(tmp_path / "a"), PAIR)[1]
    case = make_case(tmp_path / "b", label_affine=np.eye(4))
    with pytest.warns(UserWarning, match=r"p1-seg.nii.gz lies up to \d+\.\d\d mm off"):
        np.testing.assert_array_equal(read_case(case, PAIR)[1], straight)


@pytest.mark.parametrize("shift, warned", [(0.09, False), (0.25, True)])
def test_affine_tolerance(tmp_path, recwarn, shift, warned):
    moved = np.diag([-1.5, -1.5, 4, 1.0])
    moved[1, 3] = shift
    read_case(make_case(tmp_path, label_affine=moved), PAIR)
    messages = [str(w.message) for w in recwarn.list]
    assert any("0.25 mm" in message for message in messages) == warned and len(messages) == warned


def test_cache_errors(tmp_path):
    case = make_case(tmp_path)
    other = make_case(tmp_path, "p2", (20, 30, 7))
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match=r"p2-seg.nii.gz has shape \(7, 30, 20\) but its image"):
        build_cache([Case("x", case.image, other.label)], PAIR, WINDOW, 32, folder)
    with pytest.raises(UserError, match=r"p1-seg.nii.gz holds label values outside .*\(5\)"):
        build_cache([case], LabelTable(("background", "a"), {1: 1}), WINDOW, 32, folder)
    with pytest.raises(UserError, match=r"window .* is empty"):
        build_cache([case], PAIR, (275, -125), 32, folder)
    with pytest.raises(UserError, match=r"case p1: file .*none\.nii not found"):
        build_cache([Case("p1", case.image, tmp_path / "none.nii")], PAIR, WINDOW, 32, folder)
    with pytest.raises(UserError, match="case p1: file None"):
        build_cache([Case("p1", case.image)], PAIR, WINDOW, 32, folder)
    with pytest.raises(UserError, match="has no label file"):
        read_case(Case("p1", case.image), PAIR)
    assert not folder.exists() or not list(folder.iterdir())


def test_gather_slices(tmp_path):
    cases = [make_case(tmp_path, "p1"), make_case(tmp_path, "p2", (20, 30, 7))]
    cached = build_cache(cases, PAIR, WINDOW, 32, tmp_path / "cache")
    entries = [("p2", 6), ("p1", 0), ("p2", 3), ("p1", 3)]
    images, labels = gather_slices(cached, entries)
    stored = {case.case_id: case.load() for case in cached}
    for row, (case_id, index) in enumerate(entries):
        np.testing.assert_array_equal(images[row], stored[case_id][0][index])
        np.testing.assert_array_equal(labels[row], stored[case_id][1][index])
    with pytest.raises(UserError, match="not cached: p9"):
        gather_slices(cached, [("p1", 0), ("p9", 0)])
    with pytest.raises(UserError, match="empty"):
        gather_slices(cached, [])


def test_real_ct(tmp_path):
    """Voxel counts of shared/data/README.md, at native size and within a few % at 256 px."""
    root = shared("data/abdomen_ct")
    (case,) = find_cases("pairs", root, "ct.nii.gz", "seg104.nii.gz")
    assert case.case_id == "abdomen_ct"
    (cached,) = build_cache([case], TOTAL_TABLE, WINDOW, 256, tmp_path)
    assert cached.areas[:, 1:].sum(0).tolist() == [voxels for _, voxels in TOTAL.values()]
    bearing = cached.areas[:, 1:] > 0
    assert bearing.any(1).sum() == 51
    assert np.flatnonzero(bearing.all(1)).tolist() == list(range(84, 96))
    images, labels = cached.load()
    assert images.shape == (112, 256, 256) and cached.meta["orientation"] == "RAS"
    zoom = (256 / 122) ** 2
    counts = np.bincount(labels.ravel(), minlength=9)[1:]
    np.testing.assert_allclose(counts, cached.areas[:, 1:].sum(0) * zoom, rtol=0.05)

    # Anatomy in display orientation: liver on the image's left, spleen on its right, and both
    # kidneys behind the gallbladder.
    centre = {k: np.array(scipy.ndimage.center_of_mass(labels == k)) for k in range(1, 9)}
    assert centre[5][2] < 128 < centre[1][2] and centre[2][2] < centre[3][2]
    assert centre[2][1] > centre[4][1] and centre[3][1] > centre[4][1]
    table = TOTAL_TABLE.to_json() | {"other": "error"}
    with pytest.raises(UserError, match=r"seg104\.nii\.gz holds label values outside"):
        build_cache([case], LabelTable.from_json(table), WINDOW, 256, tmp_path)
