"""A label is turned to fit its image by both affines, and never in silence by anything else."""

import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from pgpsam_jax import verify as program
from pgpsam_jax.data import cache, dataset
from pgpsam_jax.data.cache import read_case
from pgpsam_jax.data.io.pairing import AWAY, Pairing, pair_grids
from pgpsam_jax.data.io.pairing import LOST as ORIENTATION_LOST
from pgpsam_jax.data.io.voxel_grid import SourceGrid
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable, load_label_table
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.evaluate import evaluate
from pgpsam_jax.report.figures import scored_volumes
from pgpsam_jax.results.runs import Run
from tests.support.orientations import AXIS_CODES, LOST, as_arrays_are_saved, stored_as
from tests.support.small_run import cached_cases, config_for, write_data

SHAPE = (12, 10, 8)
IDS = np.random.default_rng(0).choice([0, 1, 2], SHAPE).astype(np.uint8)
AFFINE = np.array([[-1.5, 0, 0, 40.0], [0, -2, 0, 25], [0, 0, 4, -90], [0, 0, 0, 1]])  # LPS


def volume(array=IDS, affine=AFFINE):
    return nib.Nifti1Image(array, affine)


def grid(image, name="label.nii"):
    return SourceGrid.of(name, image.header, image.header.get_best_affine())


def paired(image, label):
    """(pairing, the label's ids in the image's display orientation)."""
    pairing = pair_grids(grid(image, "image.nii"), grid(label))
    return pairing, pairing.display(np.asarray(label.dataobj))


def shown(image):
    """The voxels of an image in its own display orientation, S P L."""
    turned = stored_as(image, "LPS")
    return np.asarray(turned.dataobj).transpose(2, 1, 0)


@pytest.mark.parametrize("codes", AXIS_CODES)
@pytest.mark.parametrize("shift", [0.0, 0.3, 7.0, 60.0])
def test_any_orientation_and_offset(codes, shift):
    """Whichever of the two is stored otherwise, and however far its origin has moved."""
    other = stored_as(volume(), codes, (shift, 0, 0))
    for image, label in ((volume(), other), (other, volume())):
        pairing, ids = paired(image, label)
        np.testing.assert_array_equal(ids, shown(label))
        assert (pairing.code == AWAY) == (shift > 0.1)
        assert not shift or f"up to {shift:.2f} mm off" in pairing.remark


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(AXIS_CODES),
    st.sampled_from(AXIS_CODES),
    st.tuples(*[st.floats(-40, 40)] * 3),
    st.tuples(*[st.floats(-0.5, 0.5)] * 3),
    st.integers(0, 1 << 30),
)
def test_oblique_stacks(first, second, angles, jitter, seed):
    """Tilted volumes, near 45 degrees too, where rounding decides which axis is which."""
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    tilt[:3, 3] = np.random.default_rng(seed).uniform(-99, 99, 3)
    plain = volume(np.arange(IDS.size, dtype=np.int32).reshape(SHAPE))
    image, label = stored_as(plain, first), stored_as(plain, second, jitter)
    image, label = (nib.Nifti1Image(np.asarray(i.dataobj), tilt @ i.affine) for i in (image, label))
    ids, own = paired(image, label)[1], paired(image, image)[1]
    np.testing.assert_array_equal(ids, own)


def test_45_degrees_apart_by_rounding():
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", 45, degrees=True).as_matrix()
    for error in (-1e-7, 0, 1e-7):
        close = turn.copy()
        close[:3, :3] = Rotation.from_euler("z", 45 + error, degrees=True).as_matrix()
        image, label = volume(affine=turn @ AFFINE), volume(affine=close @ AFFINE)
        pairing, ids = paired(image, label)
        np.testing.assert_array_equal(ids, paired(image, image)[1])
        assert not pairing.code


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("codes", AXIS_CODES)
def test_where_one_side_has_lost_its_orientation_voxels_stay_as_stored(codes, how):
    kept = stored_as(volume(), codes)
    lost = LOST[how](np.asarray(kept.dataobj))
    for image, label in ((kept, lost), (lost, kept)):
        pairing, ids = paired(image, label)
        np.testing.assert_array_equal(ids, paired(image, image)[1])
        assert pairing.code == ORIENTATION_LOST
        side = "the label" if label is lost else "the image"
        assert side in pairing.remark and "as both are stored" in pairing.remark


def test_the_identity_may_be_true():
    """Where the boxes agree, an image at the origin is no lost one."""
    image = as_arrays_are_saved(IDS)
    for codes in AXIS_CODES:
        pairing, ids = paired(image, stored_as(image, codes, (0.3, -0.2, 0.1)))
        np.testing.assert_array_equal(ids, shown(image))
        assert pairing.code == AWAY


def test_no_forms_with_an_affine_that_fits_by_chance():
    """What stands for a missing orientation may lie right over the image, mirrored."""
    lost = LOST["no forms"](IDS)
    stand_in = lost.header.get_best_affine()
    image = nib.Nifti1Image(IDS, np.diag([-1.0, 1, 1, 1]) @ stand_in)
    pairing, ids = paired(image, lost)
    np.testing.assert_array_equal(ids, shown(image))
    assert pairing.code == ORIENTATION_LOST


def test_contradictions_are_refused():
    """A voxel size but no place: stored alike, or turned with its origin lost? Nobody knows."""
    label = nib.Nifti1Image(IDS, np.diag([1.5, 2.0, 4.0, 1.0]))
    with pytest.raises(UserError, match=r"label.nii contradicts its image image.nii .*RAS and LPS"):
        paired(volume(), label)
    pairing, ids = paired(volume(), nib.Nifti1Image(IDS, np.diag([-1.5, -2.0, 4.0, 1.0])))
    np.testing.assert_array_equal(ids, shown(volume()))  # the same axes: there is nothing to ask
    assert pairing.code == AWAY
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (45, 40, 0), degrees=True).as_matrix()
    with pytest.raises(UserError, match="neither is evidently wrong"):
        paired(volume(), volume(affine=turn @ AFFINE))


def test_shapes_that_do_not_fit():
    with pytest.raises(UserError, match=r"label.nii has shape \(8, 10, 11\) but its image"):
        paired(volume(), volume(IDS[:-1]))
    with pytest.raises(UserError, match="has shape"):  # as stored, not as turned
        paired(volume(), LOST["no forms"](IDS.transpose(1, 0, 2)))


class Knows:
    """A predictor that gives back what is stored in the intensities."""

    preprocessing, oracle = Preprocessing(32, (0, 400)), False

    def __call__(self, volume):
        return np.where(volume.array > 150, 2, np.where(volume.array > 30, 1, 0)).astype(np.uint8)


@pytest.mark.parametrize("codes, how", [("LPS", None), ("SAL", None), ("RAS", "identity")])
def test_training_evaluation_verify_and_report_pair_alike(tmp_path, codes, how):
    """One mistake in one of them would be a label that is silently turned."""
    root = write_data(tmp_path / "data", ("a", "b"))
    for case in ("a", "b"):
        path = root / "labels" / f"{case}.nii.gz"
        label = nib.load(path)
        if how is None:
            nib.save(stored_as(label, codes, (0.3, 0, 0)), path)
        else:
            nib.save(LOST[how](np.asarray(label.dataobj)), path)
    config = config_for(root, data__axis="axial")
    split, workdir = dataset.find_split(config.data), tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (cached,) = cached_cases(config, split, workdir)
        volume, truth = read_case(split.train[0], split.table)
        images, labels = cached.load()
        at_organ = [[images[labels == k].mean() for k in range(3)]]
        settings = {"nsd_tolerance_mm": 2, "min_pixels": 1, "overlays": False}
        folder = workdir / "evaluation"
        summary = evaluate(Knows(), split.test, split.table, folder, **settings)
        run = Run(workdir, config, split.table.names, {}, {}, {}, [], [{"case": "b"}], None, None)
        seen = scored_volumes.TestSet(run).read("b", [run])
    assert np.mean(Knows()(volume) == truth) == 1
    assert at_organ[0][0] < 0.3 < at_organ[0][1] < at_organ[0][2]
    assert summary["strict"]["dice_class_mean"] == 1
    notices = (folder / "summary.md").read_text()
    assert ("as both are stored" in notices) == (how is not None)
    np.testing.assert_array_equal(seen[1], seen[2][0])
    said = []
    globs = {"image_glob": "images/*.nii.gz", "label_glob": "labels/*.nii.gz"}
    table = load_label_table(root / "table.json")
    report = program.verify(root, table=table, say=said.append, **globs)
    codes_found = {f["code"] for file in report["files"] for f in file["findings"]}
    assert codes_found == ({ORIENTATION_LOST} if how else {AWAY})
    assert report["counts"]["errors"] == 0


def test_a_cache_of_the_old_pairing_is_not_used(tmp_path, monkeypatch):
    """Files that were paired by their stored order once are made anew where that was wrong."""
    for name, image in (("i", volume(IDS.astype(np.int16))), ("l", stored_as(volume(), "RAI"))):
        affine = image.affine.copy()
        affine[0, 3] += 0.3 * (name == "l")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), tmp_path / f"{name}.nii")
    case = Case("p", tmp_path / "i.nii", tmp_path / "l.nii")
    table = LabelTable(("background", "a", "b"), {1: 1, 2: 2})
    small = Preprocessing(16, (-1, 3))

    def built():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (found,) = cache.build_cache([case], table, small, tmp_path / "cache")
        return found.file

    with monkeypatch.context() as patch:
        patch.setattr(cache, "pair_grids", lambda image, label: Pairing(image))
        old = built()
    assert built() != old
