"""`pgpsam_jax.load_run`: the same masks as the command, from paths, nibabel images and volumes."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from flax import nnx

import pgpsam_jax
from pgpsam_jax import predict
from pgpsam_jax.data import dataset
from pgpsam_jax.data.io.nifti import from_nibabel
from pgpsam_jax.data.io.volumes import read_image
from pgpsam_jax.data.letterbox import Letterbox, logits_to_native
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.models.sam.mask_decoder import upsample_logits
from tests.support.places import REPOSITORY
from tests.support.ready_run import ready_run
from tests.support.small_run import write_data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    less = dict.fromkeys(("model__cfm", "model__ppr", "model__ppg"), False)  # to compile
    workdir = ready_run(root, tmp_path_factory.mktemp("run"), evaluated=False, **less)
    run = pgpsam_jax.load_run(workdir)
    # By the program that is compiled already; `test_train` has the evaluation of a workdir.
    workdirs.run_evaluation(run.config, workdir, run.predictor, dataset.find_split(run.config.data))
    return run


def same(ours, theirs):
    """Equal voxels, type, affine and every field of the header."""
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    assert ours.header == theirs.header and np.array_equal(ours.affine, theirs.affine)


def test_what_a_run_holds(run):
    assert run.label_names == ("background", "liver", "spleen")
    assert run.config.name == "small" and run.config.train.steps == 6
    assert isinstance(run.model, nnx.Module) and run.model is run.model
    results = run.results
    assert results.names == run.label_names
    assert {row["case"] for row in results.cases} == {"c"}


def test_masks_are_those_of_predict_and_evaluation(run, root, tmp_path):
    image = root / "images" / "c.nii.gz"
    ours = run.segment(image)
    assert ours.get_data_dtype() == np.uint8
    assert len(np.unique(np.asarray(ours.dataobj))) > 1  # something was found to compare
    options = dict(run=run.identity)
    inputs = predict.find_inputs(image)
    assert not predict.predict(run.predictor, run.label_names, inputs, tmp_path, **options)
    same(ours, nib.load(tmp_path / "c.nii.gz"))
    same(ours, nib.load(run.workdir / "evaluation" / "predictions" / "c.nii.gz"))


def test_path_image_and_volume_give_one_mask(run, root):
    path = root / "images" / "c.nii.gz"
    expected = run.segment(str(path))
    same(run.segment(nib.load(path)), expected)
    same(run.segment(read_image(path)), expected)


def test_the_model_gives_the_logits_behind_the_mask(run, root):
    volume = read_image(root / "images" / "c.nii.gz")
    logits = run.passes(volume, range(len(volume.array)))[-1].logits
    shape = volume.array.shape[1:]
    native = logits_to_native(logits, Letterbox.of(shape, 32), shape)
    assert np.mean(np.argmax(native, -1) == run.predictor(volume)) > 0.999  # ties may differ
    inputs = run.inputs(volume, range(len(volume.array)))
    assert len(inputs) > run.predictor.batch_size
    slices, own = run.predictor.slices(inputs), upsample_logits(logits, (32, 32))
    assert slices.shape == inputs.shape and slices.dtype == np.uint8
    assert np.mean(np.argmax(own, -1) == slices) > 0.999
    assert run.predictor._predict._cache_size() == 1  # the network was compiled once for both


def images(rng):
    """Images that differ from their files in all that a reader could take from the wrong place."""
    affine = np.diag([-0.8, -0.7, 3.0, 1.0])
    affine[:3, 3] = (10, 20, -5)
    ids = rng.integers(-200, 300, (6, 7, 4))
    yield "int16", nib.Nifti1Image(ids.astype(np.int16), affine)
    yield "float32", nib.Nifti1Image((ids / 3).astype(np.float32), affine)
    yield "nifti2", nib.Nifti2Image(ids.astype(np.int16), affine)
    yield "singleton axis", nib.Nifti1Image(ids.astype(np.int16)[..., None], affine)
    yield "big endian", nib.Nifti1Image(ids.astype(">i2"), affine, nib.Nifti1Header(endianness=">"))
    scaled = nib.Nifti1Image(ids / 7, affine)
    scaled.set_data_dtype(np.int16)
    yield "scaled", scaled
    extended = nib.Nifti1Image(ids.astype(np.int16), affine)
    extended.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"scanner"))
    yield "extension", extended
    coded = nib.Nifti1Image(ids.astype(np.int16), affine[[1, 0, 2, 3]])
    coded.set_qform(affine[[1, 0, 2, 3]], 1)
    coded.set_sform(affine[[1, 0, 2, 3]], 4)
    coded.header.set_xyzt_units("mm", "sec")
    yield "qform and sform", coded


CASES = dict(images(np.random.default_rng(0)))


@pytest.mark.parametrize("name", CASES)
def test_a_nibabel_image_is_read_like_its_file(name, tmp_path):
    path = tmp_path / "image.nii.gz"
    nib.save(CASES[name], path)
    expected, loaded = read_image(path), nib.load(path)
    before = loaded.header.copy()
    got = from_nibabel(loaded)
    np.testing.assert_array_equal(got.array, expected.array)
    assert got.array.dtype == np.float32 and got.spacing == expected.spacing
    assert got.source.shape == expected.source.shape
    np.testing.assert_array_equal(got.source.affine, expected.source.affine)
    for form in ("get_qform", "get_sform"):
        ours, theirs = (getattr(v.source.header, form)(coded=True) for v in (got, expected))
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
    assert loaded.header == before  # the caller's image is left alone


def test_an_image_that_was_never_a_file(run, root):
    path = root / "images" / "c.nii.gz"
    stored = nib.load(path)
    made = nib.Nifti1Image(np.asarray(stored.dataobj), stored.affine)
    ours, expected = run.segment(made), run.segment(path)
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(ours.affine, stored.affine)


def test_a_changed_affine_counts():
    """Mirrored by its affine: the display array is mirrored, the mask keeps the new affine."""
    image = CASES["int16"]
    flipped = nib.Nifti1Image(image.dataobj, image.affine @ np.diag([-1, 1, 1, 1]), image.header)
    first, second = from_nibabel(image), from_nibabel(flipped)
    np.testing.assert_array_equal(second.array, first.array[..., ::-1])
    np.testing.assert_allclose(second.source.affine, flipped.affine)


def test_damaged_images_are_refused(tmp_path):
    path = tmp_path / "cut.nii"
    nib.save(CASES["int16"], path)
    image = nib.load(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.nii"):
        from_nibabel(image)
    holes = np.full((4, 4, 4), np.nan, np.float32)
    with pytest.raises(UserError, match="the nibabel image holds NaN"):
        from_nibabel(nib.Nifti1Image(holes, np.eye(4)))
    with pytest.raises(UserError, match="one 3-D volume"):
        from_nibabel(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)))


@pytest.mark.parametrize(
    "wrong", [np.zeros((3, 4, 5)), None, 3, nib.Spm99AnalyzeImage(np.zeros((2, 2, 2)), np.eye(4))]
)
def test_other_inputs_are_refused(run, wrong):
    with pytest.raises(TypeError, match=f"not {type(wrong).__name__}; arrays need their affine"):
        run.segment(wrong)


def test_missing_files_are_said(run, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.nii is not a file"):
        run.segment(tmp_path / "nowhere.nii")
    with pytest.raises(UserError, match="is not a training workdir"):
        pgpsam_jax.load_run(tmp_path)


def test_imports_are_late():
    """The package without JAX; `load_run` without the training loop and Orbax."""
    code = (
        "import sys, pgpsam_jax; assert 'jax' not in sys.modules and 'nibabel' not in sys.modules; "
        "assert 'load_run' in pgpsam_jax.__all__ and not hasattr(pgpsam_jax, 'load_runs'); "
        "pgpsam_jax.load_run; heavy = {'pgpsam_jax.training', 'orbax.checkpoint'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); print('light')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["light"]
    assert pgpsam_jax.load_run.__module__ == "pgpsam_jax.inference.trained_run"
    assert pgpsam_jax.SamPredictor.__module__ == "pgpsam_jax.inference.sam_predictor"
