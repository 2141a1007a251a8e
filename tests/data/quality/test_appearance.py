"""What volumes look like: predictions are warned of, and odd cases of a data set are named."""

import json
import re
import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax import verify as program
from pgpsam_jax.data import dataset, preprocessing
from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.io.volumes import read_image
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.quality import appearance, outliers
from pgpsam_jax.data.quality.verification import findings_of, summarize
from pgpsam_jax.errors import UserError
from tests.support.small_run import TABLE, cached_cases, config_for, write_data

CASES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), CASES)


@pytest.fixture(scope="module")
def record(root):
    config = config_for(root, data__axis="axial")
    split = dataset.find_split(config.data)
    cached = cached_cases(config, split, root / "run")
    made = appearance.training_statistics(cached, window=config.data.window, layout="pairs")
    return json.loads(json.dumps(made))


def volume(root, edit=lambda array: array, spacing=(1, 1, 1)):
    read = read_image(root / "images" / "e.nii.gz")
    array = np.ascontiguousarray(edit(read.array), dtype=np.float32)
    return Volume(
        array, tuple(a * b for a, b in zip(read.spacing, spacing, strict=True)), read.source
    )


def test_a_volume_like_those_of_training_is_not_warned_of(root, record):
    assert appearance.differences(volume(root), record) == []
    assert appearance.differences(volume(root, lambda a: a[:, 2:-2, 3:]), record) == []
    assert appearance.differences(volume(root, lambda a: a + 8), record) == []
    padded = np.float32(-2000)  # outside the field of view, as some scanners have it
    edge = lambda a: np.where(np.indices(a.shape)[1] < 2, padded, a)  # noqa: E731
    assert appearance.differences(volume(root, edge), record) == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda a: a + 1024,
        lambda a: a - 1024,
        lambda a: (np.clip(a, -160, 240) + 160) / 400,
        lambda a: -a,
        lambda a: a * 10,
        lambda a: a / 10,
        lambda a: 0 * a,
        lambda a: (a + 200) * 3,
    ],
    ids=["+1024", "-1024", "0 to 1", "negated", "x 10", "/ 10", "zero", "MR"],
)
def test_other_intensities(root, record, edit):
    (said,) = appearance.differences(volume(root, edit), record)
    assert (
        said.startswith("its intensities differ from those of the training data")
        and "check" in said
    )


@pytest.mark.parametrize(
    "factors, said",
    [((1, 2, 2), "mm wide"), ((1, 0.5, 0.5), "mm wide"), ((4, 1, 1), "apart"), ((2, 1, 1), None)],
)
def test_other_voxels(root, record, factors, said):
    found = appearance.differences(volume(root, spacing=factors), record)
    assert [said in text for text in found] == ([True] if said else [])


def test_a_run_on_slices_in_0_to_1_is_given_hu(root, record):
    unit = volume(root, lambda a: (np.clip(a, -125, 275) + 125) / 400)
    of_arrays = record | {"layout": "transunet", "window": [0.0, 1.0]}
    of_arrays |= {"whole": [[q, q] for q in appearance.describe(unit.array)["whole"]]}
    of_arrays |= {"foreground": [], "share": []}
    assert appearance.differences(unit, of_arrays) == []
    (said,) = appearance.differences(volume(root), of_arrays)
    assert "HU clipped to -125 to 275" in said


def test_records_that_cannot_be_used(tmp_path):
    assert appearance.read_statistics(tmp_path) is None
    (tmp_path / appearance.FILE).write_text('{"schema": 99}')
    assert appearance.read_statistics(tmp_path) is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=0, max_size=20), st.floats(0, 1e3))
@settings(max_examples=100, deadline=None)
def test_outliers_are_few_and_far(values, floor):
    found = outliers.outliers({str(i): v for i, v in enumerate(values)}, floor)
    assert len(found) <= len(values) / 2
    middle = np.median(values) if values else 0
    for value, least, most in found.values():
        assert abs(value - middle) > floor and (value < least or value > most)


def checked(root, change=None, *, case="b", kind="images"):
    """The findings of five cases, one of which is changed first."""
    path = root / kind / f"{case}.nii.gz"
    original = path.read_bytes()
    if change:
        image = nib.load(path)
        array, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
        nib.save(nib.Nifti1Image(array, affine), path)
    table = LabelTable.from_json(TABLE)
    globs = {"image_glob": "images/*.nii.gz", "label_glob": "labels/*.nii.gz"}
    report = program.verify(root, table=table, say=lambda line: None, **globs)
    path.write_bytes(original)
    return {(f["code"], f["file"].rsplit("/", 1)[-1]) for f in findings_of(report)}


def scaled(factors):
    return lambda array, affine: (array, affine @ np.diag([*factors, 1]))


@pytest.mark.parametrize(
    "kind, change, code",
    [
        ("images", lambda a, m: (a + 1024, m), "unlike"),
        ("images", lambda a, m: (a / 400, m), "unlike"),
        ("images", scaled((3, 3, 1)), "spacing"),
        ("images", scaled((1, 1, 4)), "spacing"),
        ("images", lambda a, m: (a, np.diag([-9.0, -2, 4, 1])), "axis"),
        ("labels", lambda a, m: (a * (np.indices(a.shape)[0] % 8 == 0), m), "volume"),
    ],
)
def test_the_odd_case_is_named(root, kind, change, code):
    assert checked(root) == set()
    assert (code, "b.nii.gz") in checked(root, change, kind=kind)


def test_cases_that_all_differ_are_one_finding():
    def image(index):
        scale = 10.0 ** (index % 2 * 3) * (1 + index / 50)
        looks = appearance.describe(scale * np.arange(8000.0).reshape(20, 20, 20))
        return {
            "case": f"c{index}",
            "part": "",
            "file": f"c{index}",
            "kind": "image",
            "findings": [],
            "shape": [20, 20, 20],
            "spacing": [1, 1, 1],
            "appearance": looks,
        }

    images = [image(index if index in (1, 3, 5) else 2 * index) for index in range(12)]
    found = list(outliers.compare(images, None, has_grid=True))
    assert [f.code for f in found] == ["unlike"] and not found[0].file
    assert "3 of 12" in found[0].message


def test_a_window_that_cuts_what_is_labeled(root):
    """Of the two organs, at 110 and 200, one is clipped to black or white: one sentence in all."""
    for window, cut in (((-125, 275), False), ((-125, 150), True), ((150, 275), True)):
        report = program.verify(
            root,
            image_glob="images/*.nii.gz",
            label_glob="labels/*.nii.gz",
            table=LabelTable.from_json(TABLE),
            window=window,
            say=lambda line: None,
        )
        found = [finding for finding in findings_of(report) if finding["code"] == "cut"]
        assert len(found) == cut
        if cut:
            (message,) = (finding["message"] for finding in found)
            shares = {
                file["case"]: file["clipped"]["below"] + file["clipped"]["above"]
                for file in report["files"]
                if file["kind"] == "image"
            }
            assert "in 5 of 5 cases" in message and min(shares.values()) > 0.3
            assert f"most in {max(shares, key=shares.get)} (" in message
            assert "above" in message and "widen data.window" in message


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data__window": (-125.0, 150.0)}, r"data\.window .* clips more than 5% .* in 2 of 2"),
        ({"data__normalize": "percentile", "data__percentiles": (0.0, 98.0)}, r"data\.percentiles"),
        ({"data__normalize": "zscore"}, r"data\.normalize zscore .*set data\.normalize=percentile"),
        ({}, None),
    ],
)
def test_clipped_labels_are_told_when_volumes_are_read(root, tmp_path, settings, said):
    config = config_for(root, data__axis="axial", **settings)
    split = dataset.find_split(config.data)
    for _ in range(2):  # made, then found
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            cached_cases(config, split, tmp_path, split.train[:2])
        told = [str(one.message) for one in told if "clips" in str(one.message)]
        assert len(told) == (said is not None)
        assert said is None or re.search(said, told[0])


def test_no_orientation_is_named(root):
    def strip(array, _):
        return array, None

    assert ("no_orientation", "b.nii.gz") in checked(root, strip)


@pytest.mark.parametrize("shape, level", [((24, 20, 10), "error"), ((10, 30, 30), "warning")])
def test_plain_volumes_against_training_slices(shape, level):
    def image(name, part, shape):
        looks = appearance.describe(np.arange(float(np.prod(shape))).reshape(shape))
        return {
            "case": name,
            "part": part,
            "group": "",
            "features": {},
            "files": [
                {
                    "file": name,
                    "kind": "image",
                    "findings": [],
                    "shape": list(shape),
                    "spacing": [1, 1, 1],
                    "appearance": looks,
                }
            ],
        }

    cases = [image("a", "train", (10, 24, 20)), image("b", "test", shape)]
    report = summarize(cases, LabelTable.from_json(TABLE), has_grid=False)
    (finding,) = findings_of(report)
    assert finding["level"] == level and finding["file"] == "b"


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
def test_normalization_by_the_volume_makes_intensities_relative(root, tmp_path, kind):
    """As in MR: the same picture at another scale is the same input, trained on and predicted."""
    factor = 300.0
    other = write_data(tmp_path / "scaled", CASES)
    for case in CASES:
        path = other / "images" / f"{case}.nii.gz"
        image = nib.load(path)
        array = np.asarray(image.dataobj).astype(np.float32) * factor
        nib.save(nib.Nifti1Image(array, image.affine), path)
    settings = {"data__axis": "axial", "data__percentiles": (1.0, 99.0), "data__normalize": kind}
    inputs = []
    for folder in (root, other):
        config = config_for(folder, **settings)
        split = dataset.find_split(config.data)
        cached = cached_cases(config, split, tmp_path / folder.name, split.train[:1])
        images, _ = cached[0].load()
        window = preprocessing.window_of(config.data)
        inputs.append(images)
        volume = read_image(folder / "images" / f"{split.train[0].case_id}.nii.gz")
        ends = preprocessing.intensity_limits(window, volume.array)
        inside = np.mean((volume.array >= ends[0]) & (volume.array <= ends[1]))
        assert inside == pytest.approx({"percentile": 0.98, "zscore": 0.953}[kind], abs=0.005)
        record = appearance.training_statistics(cached, window=window, layout="pairs")
        assert appearance.differences(volume, record) == []
    np.testing.assert_allclose(*inputs, atol=2e-3)
    fixed = config_for(other, data__axis="axial")
    (plain,) = cached_cases(fixed, split, tmp_path / other.name, split.train[:1])
    assert plain.file != cached[0].file and np.abs(plain.load()[0] - inputs[1]).max() > 0.1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data__percentiles": (-5.0, 50.0)}, r"data\.percentiles"),
        ({"data__percentiles": (0.0, 101.0)}, r"data\.percentiles"),
        ({"data__percentiles": (60.0, 40.0)}, r"data\.percentiles"),
        ({"data__normalize": "percent"}, r"data\.normalize .* window, percentile, zscore"),
    ],
)
def test_normalizations_that_are_none(root, settings, said):
    config = config_for(root, **settings)
    with pytest.raises(UserError, match=said):
        preprocessing.window_of(config.data)
