"""Cache files of preprocessed volumes: content, keys, damage; one real CT."""

import hashlib
import itertools
import json
import os
import warnings

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.data.cache import build_cache, gather_slices, read_case
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.find import find_cases
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.letterbox import Letterbox, to_model
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from tests.support.label_tables import PAIR, TOTAL, TOTAL_TABLE
from tests.support.places import shared


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
SMALL = Preprocessing(32, WINDOW)


def test_cache_content(tmp_path):
    case = make_case(tmp_path)
    (cached,) = build_cache([case], PAIR, Preprocessing(64, WINDOW), tmp_path / "cache")
    images, labels = cached.load()
    assert images.dtype == np.float16 and labels.dtype == np.uint8
    assert images.shape == labels.shape == (6, 64, 64) and cached.shape == (6, 30, 20)
    assert images.min() >= 0 and images.max() <= 1

    volume, ids = read_case(case, PAIR)
    window = np.clip((volume.array + 125) / 400, 0, 1)
    letterbox = Letterbox.of((30, 20), 64)
    np.testing.assert_allclose(images, to_model(window, letterbox, 1), atol=6e-4)  # half precision
    np.testing.assert_array_equal(labels, to_model(ids, letterbox, 0))
    counts = [[(part == k).sum() for k in range(3)] for part in ids]
    np.testing.assert_array_equal(cached.areas, counts)
    assert cached.areas[3].tolist() == [600 - 75 - 36, 75, 36]

    assert cached.spacing == pytest.approx((4, 1.5, 1.5))
    assert cached.meta["orientation"] == "LPS"
    assert cached.meta["sources"]["image"] == hashlib.sha256(case.image.read_bytes()).hexdigest()


def test_cache_is_reused_and_keyed_by_content(tmp_path):
    cases = [make_case(tmp_path, "p1"), make_case(tmp_path, "p2", (20, 30, 7))]
    folder = tmp_path / "cache"

    def files(table=PAIR, size=32, window=WINDOW):
        built = build_cache(cases, table, Preprocessing(size, window), folder)
        return [case.file for case in built]

    first = files()
    assert [file.name.split("-")[0] for file in first] == ["p1", "p2"]
    stamps = [os.stat(file).st_mtime_ns for file in first]
    assert files() == first and [os.stat(file).st_mtime_ns for file in first] == stamps
    others = [
        files(window=(-100, 275)),
        files(size=48),
        files(table=LabelTable(("background", "a", "c"), {1: 1, 2: 1, 5: 2})),
        files(table=LabelTable(PAIR.names, PAIR.source_to_class, "background")),
    ]
    make_case(tmp_path, "p1", affine=np.diag([-1.4, -1.4, 4, 1.0]))
    changed = files()
    assert changed[0] != first[0] and changed[1] == first[1]
    made = {*first, *changed, *itertools.chain(*others)}
    outdated = {first[0], *(pair[0] for pair in others)}  # of p1 as it was
    assert len(made) == 11 and sorted(folder.iterdir()) == sorted(made - outdated)


def test_cleaning_spares_what_may_be_used_again(tmp_path):
    """Other data sets with a case of that name, other names, old and foreign files."""
    folder = tmp_path / "cache"

    def build(*cases, size=32):
        return [c.file for c in build_cache(cases, PAIR, Preprocessing(size, WINDOW), folder)]

    case = make_case(tmp_path / "a")
    kept = build(make_case(tmp_path / "b", affine=np.diag([-1, -1, 4, 1.0])), size=32)
    kept += build(make_case(tmp_path / "a", "p1-2", (8, 9, 4)))
    (old,) = build(case)
    with np.load(old) as arrays:  # as a version made them that did not say where from
        meta = json.loads(str(arrays["meta"]))
        del meta["places"]
        np.savez(folder / f"p1-{'0' * 16}.npz", **{**arrays, "meta": np.array(json.dumps(meta))})
    (folder / "p1-notes.npz").write_bytes(b"no archive")
    kept += [folder / f"p1-{'0' * 16}.npz", folder / "p1-notes.npz"]
    (other,) = build(case, size=48)
    make_case(tmp_path / "a", affine=np.diag([-1.4, -1.4, 4, 1.0]))
    (new,) = build(case)
    assert sorted(folder.iterdir()) == sorted([*kept, new]) and not old.exists()
    assert not other.exists() and build(case) == [new]


def test_gray_levels_are_stored_and_part_of_the_key(tmp_path):
    case = make_case(tmp_path)
    (plain,) = build_cache([case], PAIR, Preprocessing(64, WINDOW), tmp_path / "cache")
    (same,) = build_cache([case], PAIR, Preprocessing(64, WINDOW, levels=0), tmp_path / "cache")
    (byte,) = build_cache([case], PAIR, Preprocessing(64, WINDOW, levels=256), tmp_path / "cache")
    (coarse,) = build_cache([case], PAIR, Preprocessing(64, WINDOW, levels=16), tmp_path / "cache")
    assert same.file == plain.file and len({plain.file, byte.file, coarse.file}) == 3
    array = read_case(case, PAIR)[0].array
    for cached, levels in ((plain, 0), (byte, 256), (coarse, 16)):
        seen = Preprocessing(64, WINDOW, levels).to_model(array, WINDOW)
        np.testing.assert_array_equal(cached.load()[0], seen.astype(np.float16))
    for levels in (1, -1):
        with pytest.raises(UserError, match=rf"data\.levels is {levels}; give 0"):
            Preprocessing(64, WINDOW, levels)


def test_keys_of_caches_made_before_the_choice_of_levels(tmp_path):
    case = make_case(tmp_path)
    (cached,) = build_cache([case], PAIR, Preprocessing(64, WINDOW), tmp_path / "cache")
    recipe = {
        "format": 1,
        "window": [-125.0, 275.0],
        "size": 64,
        "table": PAIR.to_json(),
        "sources": cached.meta["sources"],
    }
    text = json.dumps(recipe, sort_keys=True)
    assert cached.meta["key"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("damage", ["empty", "half", "tail", "flip", "garbage", "other"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    case = make_case(tmp_path)
    (cached,) = build_cache([case], PAIR, SMALL, tmp_path / "cache")
    images, labels = cached.load()
    data = bytearray(cached.file.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 1
    if damage == "other":
        (other,) = build_cache([case], PAIR, Preprocessing(32, (0, 1)), tmp_path / "cache")
        data = other.file.read_bytes()
    cut = {"empty": 0, "half": len(data) // 2, "tail": len(data) - 1}.get(damage, len(data))
    cached.file.write_bytes(b"no zip at all" if damage == "garbage" else data[:cut])
    if damage == "other":
        (again,) = build_cache([case], PAIR, SMALL, tmp_path / "cache")
    else:
        with pytest.warns(UserWarning, match="damaged .* rebuilding"):
            (again,) = build_cache([case], PAIR, SMALL, tmp_path / "cache")
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
    (cached,) = build_cache([case], table, Preprocessing(8, WINDOW), base / "cache")
    good, expected = cached.file.read_bytes(), cached.load()
    broken = bytearray(good)
    broken[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    cached.file.write_bytes(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (again,) = build_cache([case], table, Preprocessing(8, WINDOW), base / "cache")
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
    with pytest.warns(
        UserWarning, match=r"p1-seg.nii.gz .* as both are stored, because the affine of the"
    ):
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
        build_cache([Case("x", case.image, other.label)], PAIR, SMALL, folder)
    with pytest.raises(UserError, match=r"p1-seg.nii.gz holds label values outside .* 5 \(\d+"):
        build_cache([case], LabelTable(("background", "a"), {1: 1}), SMALL, folder)
    with pytest.raises(UserError, match=r"window .* is empty"):
        Preprocessing(32, (275, -125))
    with pytest.raises(UserError, match=r"case p1: file .*none\.nii not found"):
        build_cache([Case("p1", case.image, tmp_path / "none.nii")], PAIR, SMALL, folder)
    with pytest.raises(UserError, match=r"case p1 .* has no label file"):
        build_cache([Case("p1", case.image)], PAIR, SMALL, folder)
    with pytest.raises(UserError, match="has no label file"):
        read_case(Case("p1", case.image), PAIR)
    assert not folder.exists() or not list(folder.iterdir())


def test_gather_slices(tmp_path):
    cases = [make_case(tmp_path, "p1"), make_case(tmp_path, "p2", (20, 30, 7))]
    cached = build_cache(cases, PAIR, SMALL, tmp_path / "cache")
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


@pytest.mark.golden
def test_real_ct(tmp_path):
    """Voxel counts of the recorded CT, at native size and within a few % at 256 px."""
    root = shared("data/abdomen_ct")
    (case,) = find_cases("pairs", root, "ct.nii.gz", "seg104.nii.gz")
    assert case.case_id == "abdomen_ct"
    (cached,) = build_cache([case], TOTAL_TABLE, Preprocessing(256, WINDOW), tmp_path)
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
    center = {k: np.array(scipy.ndimage.center_of_mass(labels == k)) for k in range(1, 9)}
    assert center[5][2] < 128 < center[1][2] and center[2][2] < center[3][2]
    assert center[2][1] > center[4][1] and center[3][1] > center[4][1]
    table = TOTAL_TABLE.to_json() | {"other": "error"}
    with pytest.raises(UserError, match=r"seg104\.nii\.gz holds label values outside"):
        build_cache([case], LabelTable.from_json(table), Preprocessing(256, WINDOW), tmp_path)
