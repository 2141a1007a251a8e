"""Several runs as one: mean probabilities, what does not belong together, maps beside masks."""

import sys

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax import predict
from pgpsam_jax.config import load_config
from pgpsam_jax.config.serialization import save_config
from pgpsam_jax.data.io.voxel_grid import to_display
from pgpsam_jax.inference.ensemble import load_runs
from pgpsam_jax.inference.postprocessing import uncertainty
from pgpsam_jax.inference.settings import InferenceSettings, write
from pgpsam_jax.utils.files import write_json
from tests.support.ready_run import ready_run
from tests.support.small_run import NAMES, write_data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def workdirs(root, tmp_path_factory):
    """Two untrained runs of different sizes, the first of which drops components."""
    made = []
    for alpha in (2, 3):
        workdir = tmp_path_factory.mktemp(f"run{alpha}")
        made.append(str(ready_run(root, workdir, evaluated=False, model__alpha=alpha)))
    write(InferenceSettings(components=(1.0, 0.0)), made[0], NAMES, {})
    return made


def run(monkeypatch, root, output, *flags):
    argv = ["predict", "--input", str(root / "images"), "--output", str(output), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    predict.main()


def test_runs_are_averaged_and_maps_lie_on_the_grid_of_the_image(
    root, workdirs, tmp_path, monkeypatch
):
    maps = ("--probabilities", "--uncertainty")
    run(monkeypatch, root, tmp_path, "--workdir", *workdirs, *maps)
    both = load_runs(workdirs)
    image = nib.load(root / "images" / "a.nii.gz")
    volume = both.runs[0].read(root / "images" / "a.nii.gz")
    parts = [each.predictor.probabilities(volume).astype(np.float32) for each in both.runs]
    assert np.abs(parts[0] - parts[1]).max() > 1e-3
    wanted = np.mean(parts, axis=0)
    found = nib.load(tmp_path / "probabilities" / "a.nii.gz")
    assert found.shape == (*image.shape, 3) and found.get_data_dtype() == np.float32
    np.testing.assert_array_equal(found.affine, image.affine)
    shown = to_display(np.asarray(found.dataobj), volume.source)
    np.testing.assert_allclose(shown, wanted, atol=1e-3)
    mask = to_display(np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj), volume.source)
    ids = both.predictor.decide(both.predictor.probabilities(volume))
    np.testing.assert_array_equal(mask, ids)
    doubt = nib.load(tmp_path / "uncertainty" / "a.nii.gz")
    assert doubt.shape == image.shape
    doubt = to_display(np.asarray(doubt.dataobj), volume.source)
    np.testing.assert_allclose(doubt, uncertainty(wanted), atol=2e-3)


def test_masks_of_the_two_are_others_than_those_of_one(
    root, workdirs, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, root, tmp_path, "--workdir", workdirs[0])
    with pytest.raises(SystemExit):
        run(monkeypatch, root, tmp_path, "--workdir", *workdirs)
    assert "masks of another run" in capsys.readouterr().err


def test_runs_of_other_classes_or_axes_are_refused(
    root, workdirs, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    other = ready_run(root, tmp_path_factory.mktemp("other"), evaluated=False)
    write_json(
        other / "labels.json",
        {
            "classes": [{"name": "liver", "source": [6]}, {"name": "x", "source": [1]}],
            "other": "background",
        },
    )
    with pytest.raises(SystemExit):
        run(monkeypatch, root, tmp_path / "1", "--workdir", workdirs[0], str(other))
    assert "their classes differ, background, liver, x and" in capsys.readouterr().err
    turned = ready_run(root, tmp_path_factory.mktemp("turned"), evaluated=False)
    config = load_config(turned)
    config.data.axis = "coronal"
    save_config(config, turned)
    with pytest.raises(SystemExit):
        run(monkeypatch, root, tmp_path / "2", "--workdir", workdirs[0], str(turned))
    assert "their slice axis differ, coronal and axial" in capsys.readouterr().err


def test_boxes_have_no_probabilities(tmp_path, monkeypatch, root, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, root, tmp_path, "--base", "x", "--boxes", "y", "--probabilities")
    assert "--probabilities needs --workdir" in capsys.readouterr().err
