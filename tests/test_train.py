"""The run as a whole, at small size: train, resume, evaluate, predict, and what is left on disk."""

import json

import jax
import nibabel as nib
import numpy as np
import pytest
from small_run import config_for, write_data

from pgpsam_jax import predict, runlog, train
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.report import read_cases


def losses(workdir):
    """Every logged number but the speed, by step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """(workdir, summary) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train.train(config_for(root), workdir)


def test_a_run_leaves_all_its_records(finished):
    workdir, _ = finished
    assert [r["step"] for r in losses(workdir)] == [1, 2, 3, 4, 5, 6]
    assert losses(workdir)[-1]["loss"] < losses(workdir)[0]["loss"]
    provenance = json.loads((workdir / "provenance.json").read_text())
    assert provenance["packages"]["jax"] == jax.__version__
    assert json.loads((workdir / "config.json").read_text())["model"]["image_size"] == 32
    assert "liver" in (workdir / "labels.json").read_text()
    assert (workdir / "fewshot.txt").read_text().count("\n") == 3 + 7
    assert (workdir / "training.png").stat().st_size > 10_000
    steps = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert steps == {"4", "6"}
    assert not list(workdir.rglob(".tmp-*"))


def test_evaluation_files(finished):
    workdir, summary = finished
    folder = workdir / "evaluation"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["n_cases"] == 1
    for protocol in ("strict", "transunet"):
        assert {"dice_class_mean", "dice_case_mean", "per_class"} <= set(summary[protocol])
        assert set(summary[protocol]["per_class"]) == {"liver", "spleen"}
    assert {"dice", "hd95", "nsd"} <= set(summary["strict"]["per_class"]["liver"])
    rows = read_cases(folder / "cases.csv")
    assert {row["case"] for row in rows} == {"c"}
    assert "trained from scratch" in (folder / "summary.md").read_text()
    assert list((folder / "overlays").glob("c_worst_z*.png"))
    mask = nib.load(folder / "predictions" / "c.nii.gz")
    assert mask.shape == (24, 20, 10) and mask.get_data_dtype() == np.uint8


def test_same_seed_same_losses(finished, root, tmp_path):
    train.train(config_for(root), tmp_path / "again")
    assert losses(tmp_path / "again") == losses(finished[0])


def test_interrupted_and_resumed_equals_uninterrupted(finished, root, tmp_path, monkeypatch):
    workdir, advance = tmp_path / "cut", runlog.RunLog.advance

    def stop_in_step_4(log):
        advance(log)
        if log._bar.n == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runlog.RunLog, "advance", stop_in_step_4)
        with pytest.raises(KeyboardInterrupt):
            train.train(config_for(root), workdir)
    assert [r["step"] for r in losses(workdir)] == [1, 2, 3]
    summary = train.train(config_for(root), workdir)
    assert losses(workdir) == losses(finished[0])
    assert summary == finished[1]


def test_a_finished_run_only_evaluates_again(finished, root):
    workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert train.train(config_for(root), workdir) == summary
    assert (workdir / "metrics.jsonl").read_text() == before
    assert train.evaluate_workdir(workdir) == summary


def test_another_configuration_is_refused(finished, root):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.003 there, 0.1 now"):
        train.train(config_for(root, optim__learning_rate=0.1), workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path):
    config = config_for(root, optim__learning_rate=1e38, optim__final_learning_rate=0.0)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d .*optim.clip_norm"):
        train.train(config, tmp_path / "run")


def test_predict_equals_evaluation(finished, root, tmp_path):
    workdir, _ = finished
    config = train.configuration.load_config(workdir)
    predictor = train.load_predictor(config, workdir, 3)
    names = ["background", "liver", "spleen"]
    inputs = predict.find_inputs(root / "images")
    options = dict(overlay=True, skip_existing=False)
    assert predict.predict(predictor, names, inputs, tmp_path, **options) == 0
    ours = np.asarray(nib.load(tmp_path / "c.nii.gz").dataobj)
    theirs = np.asarray(nib.load(workdir / "evaluation" / "predictions" / "c.nii.gz").dataobj)
    assert np.array_equal(ours, theirs)
    assert json.loads((tmp_path / "labels.json").read_text()) == {
        "background": 0,
        "liver": 1,
        "spleen": 2,
    }
    assert (tmp_path / "c.png").stat().st_size > 5_000


def test_a_truncated_checkpoint_is_said(finished, root, tmp_path):
    import shutil

    workdir = tmp_path / "damaged"
    shutil.copytree(finished[0], workdir)
    for path in (workdir / "checkpoints" / "6" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(UserError, match=r"checkpoints/6 cannot be read"):
        train.load_predictor(train.configuration.load_config(workdir), workdir, 3)


def test_no_workdir_no_checkpoint(tmp_path, finished):
    with pytest.raises(UserError, match=r"config.json not found"):
        train.evaluate_workdir(tmp_path)
    for name in ("config.json", "fewshot.txt", "labels.json", "base.json", "frozen.safetensors"):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    with pytest.raises(UserError, match=r"holds no complete checkpoint"):
        train.evaluate_workdir(tmp_path)
