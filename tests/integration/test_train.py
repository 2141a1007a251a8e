"""The run as a whole, at small size: train, resume, evaluate, predict, and what is left on disk."""

import json
import shutil
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax import predict
from pgpsam_jax.checkpointing import best_parameters, checkpoint
from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.inference import restore
from pgpsam_jax.methods import build
from pgpsam_jax.metrics.release_protocol import mean_slice_dice
from pgpsam_jax.metrics.summary import read_cases, read_slices
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import metric_logger, plan, train
from tests.support import kept_steps, tiny_method
from tests.support.faults import NOISE, TINY, run
from tests.support.file_modes import modes, umask
from tests.support.small_run import NAMES, cached_cases, config_for, hold_out, write_data

SELECT = {"validation__every_epochs": 1}  # 7 slices in batches of 8: after every step


def losses(workdir, but=("images_per_second",)):
    """Every logged number but the speed, by step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in but} for r in records]


def numbers(workdir, folder):
    """Every value of the parameters in a folder of checkpoints, as Orbax wrote them."""
    config = serialization.load_config(workdir)
    mesh = plan.mesh_of(config.mesh, config.model, config.train.batch_size)
    _, params, _ = build.abstract_model(config.model, 3)
    shardings = device_mesh.state_shardings(params, mesh)
    kept = folder(workdir)
    params = kept.restore_params(checkpoint.abstract_like(params, shardings))
    kept.close()
    return {path: np.asarray(leaf[...]) for path, leaf in flat_paths(params).items()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(np.array_equal(value, theirs[path]) for path, value in ours.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_data(tmp_path_factory.mktemp("data"), cases=("a", "b", "v", "c"))
    hold_out(root, "v")
    return root


@pytest.fixture(scope="module", params=["tiny", pytest.param("pgpsam", marks=pytest.mark.slow)])
def method(request):
    """Settings of what is trained: what compiles soonest, once for all, and the real model."""
    if request.param == "tiny":
        with tiny_method.known(), kept_steps.kept(draws=True):
            yield TINY | NOISE | {"model__train_encoder": "full", "eval__overlays": True}
    else:
        yield {}


@pytest.fixture
def plain(method, monkeypatch):
    """The same settings, of which the pictures are no part: they are drawn for one run alone."""
    monkeypatch.setattr(metric_logger.MetricLogger, "_draw", lambda self: None)
    return method | {"eval__overlays": False}


@pytest.fixture(scope="module")
def finished(root, method, tmp_path_factory):
    """(workdir, summary) of an uninterrupted run with selection on the validation case."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with umask(0o027):
        return workdir, train.train(config_for(root, **method, **SELECT), workdir)


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
    timing = json.loads((workdir / "timing.json").read_text())
    assert {"train", "validate", "evaluate"} <= timing.keys()
    assert not list(workdir.rglob(".tmp-*"))
    assert modes(workdir) == {"files": {0o640}, "folders": {0o750}}


def test_evaluation_files(finished):
    workdir, summary = finished
    folder = workdir / "evaluation"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["n_cases"] == 1
    for protocol in ("strict", "transunet", "release"):
        assert {"dice_class_mean", "dice_case_mean", "per_class"} <= set(summary[protocol])
        assert set(summary[protocol]["per_class"]) == {"liver", "spleen"}
    assert {"dice", "hd95", "nsd"} <= set(summary["strict"]["per_class"]["liver"])
    rows = read_cases(folder / "cases.csv")
    assert {row["case"] for row in rows} == {"c"}
    assert {row["protocol"] for row in rows} == {"strict", "transunet", "release"}
    slices = read_slices(folder / "slices.csv")
    assert len(slices) == 2 * summary["release"]["n_slices"] > 0
    assert "trained from scratch" in (folder / "summary.md").read_text()
    assert list((folder / "overlays").glob("c_worst_z*.png"))
    mask = nib.load(folder / "predictions" / "c.nii.gz")
    assert mask.shape == (24, 20, 10) and mask.get_data_dtype() == np.uint8


def test_the_best_parameters_are_kept_and_used(finished):
    workdir, summary = finished
    scores = [record["validation_score"] for record in losses(workdir)]
    best = best_parameters.best_record(workdir)
    assert best == {"step": 1 + int(np.argmax(scores)), "score": max(scores)}
    assert len({path.name for path in (workdir / "best").iterdir()}) == 1
    assert any(f"from step {best['step']}," in notice for notice in summary["notices"])
    kept = numbers(workdir, best_parameters.BestCheckpoint)
    assert same(kept, numbers(workdir, checkpoint.Checkpoints)) == (best["step"] == 6)
    config = serialization.load_config(workdir)
    split = dataset.find_split(config.data)
    predictor = restore.load_predictor(config, workdir, NAMES)
    used = {k: np.asarray(leaf[...]) for k, leaf in flat_paths(predictor.params).items()}
    assert same(used, kept)
    cached = cached_cases(config, split, workdir, split.validation)
    held_out = dataset.validation_data(cached, 3, config.fewshot.min_pixels)
    again = mean_slice_dice(predictor.slices(held_out.images), held_out.labels, 3)
    assert again == best["score"]


def test_same_seed_same_losses_and_validation_changes_none(finished, root, tmp_path, plain):
    summary = train.train(config_for(root, **plain), tmp_path / "again")
    unselected = ("images_per_second", "validation_score")
    unselected += ("silent_epochs_liver", "silent_epochs_spleen")
    assert losses(tmp_path / "again") == losses(finished[0], but=unselected)
    assert not (tmp_path / "again" / "best").exists()
    assert not any("best on the validation cases" in notice for notice in summary["notices"])
    last = (numbers(folder, checkpoint.Checkpoints) for folder in (tmp_path / "again", finished[0]))
    assert same(*last)


def test_interrupted_and_resumed_equals_uninterrupted(finished, root, tmp_path, monkeypatch, plain):
    workdir, write = tmp_path / "cut", metric_logger.MetricLogger.write

    def stop_in_step_4(log, step, metrics):
        if step == 4:  # validated, but neither logged nor saved
            raise KeyboardInterrupt
        write(log, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(metric_logger.MetricLogger, "write", stop_in_step_4)
        with pytest.raises(KeyboardInterrupt):
            train.train(config_for(root, **plain, **SELECT), workdir)
    assert [r["step"] for r in losses(workdir)] == [1, 2, 3]
    summary = train.train(config_for(root, **plain, **SELECT), workdir)
    assert losses(workdir) == losses(finished[0])
    assert summary == finished[1]
    assert best_parameters.best_record(workdir) == best_parameters.best_record(finished[0])
    assert same(
        numbers(workdir, best_parameters.BestCheckpoint),
        numbers(finished[0], best_parameters.BestCheckpoint),
    )


def test_a_finished_run_only_evaluates_again(finished, root, tmp_path, plain):
    workdir, summary = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], workdir)
    before = (workdir / "metrics.jsonl").read_text()
    assert train.train(config_for(root, **plain, **SELECT), workdir) == summary
    assert (workdir / "metrics.jsonl").read_text() == before
    (workdir / "fewshot.txt").unlink()  # a converted run has none
    assert workdirs.evaluate_workdir(workdir) == summary


def test_another_configuration_is_refused(finished, root, method):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.003 there, 0.1 now"):
        train.train(config_for(root, **method, optim__learning_rate=0.1, **SELECT), workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_selection_is_part_of_a_run(finished, root, method):
    with pytest.raises(UserError, match=r"validation.every_epochs: 1 there, 0 now"):
        train.train(config_for(root, **method), finished[0])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path):
    settings = NOISE | {"optim__learning_rate": 1e38, "optim__final_learning_rate": 0.0}
    said = r"the loss is (nan|inf) at step \d, whose batch is .* slice .*optim.clip_norm"
    with pytest.raises(UserError, match=said):
        run(root, tmp_path / "run", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__encoded_copies": 2, "model__train_encoder": "full"}, "can be precomputed"),
        ({"optim__final_learning_rate": 1.0}, "keep it from 0 to learning_rate"),
        ({"augment__elastic_grid": 2}, "a cubic spline needs at least 4"),
    ],
    ids=str,
)
def test_settings_that_cannot_run_claim_no_folder(root, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(root, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_predict_equals_evaluation(finished, root, tmp_path):
    workdir, _ = finished
    config = serialization.load_config(workdir)
    predictor = restore.load_predictor(config, workdir, NAMES)
    names = ["background", "liver", "spleen"]
    inputs = predict.find_inputs(root / "images" / "c.nii.gz")
    options = dict(run={"workdir": "run", "parameters": "0"}, overlay=True)
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
    workdir = tmp_path / "damaged"
    shutil.copytree(finished[0], workdir)
    for path in workdir.glob("*/*/params/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    config = serialization.load_config(workdir)
    with pytest.raises(UserError, match=r"best/\d cannot be read"):
        restore.load_predictor(config, workdir, NAMES)
    shutil.rmtree(workdir / "best")
    with pytest.raises(UserError, match=r"checkpoints/6 cannot be read"):
        restore.load_predictor(config, workdir, NAMES)


def test_validation_without_validation_cases_is_said(root, tmp_path):
    config = config_for(root, data__split="fraction", data__split_file="", **SELECT)
    with pytest.raises(UserError, match=r"'fraction' has no validation cases; use btcv_18_6_6"):
        train.train(config, tmp_path / "run")
    config = config_for(root, validation__every_epochs=-1)
    with pytest.raises(UserError, match=r"every_epochs is -1; give a number of epochs"):
        train.train(config, tmp_path / "run")
    config = config_for(root, fewshot__min_pixels=10_000, data__axis="axial", **SELECT)
    split = dataset.find_split(config.data)
    cached = cached_cases(config, split, tmp_path / "run", split.validation)
    with pytest.raises(UserError, match=r"no validation slice has an organ of 10000 pixels"):
        dataset.validation_data(cached, 3, config.fewshot.min_pixels)


def test_no_workdir_no_checkpoint(tmp_path, finished):
    with pytest.raises(UserError, match=r"config.json not found"):
        workdirs.evaluate_workdir(tmp_path)
    for path in filter(Path.is_file, finished[0].iterdir()):
        shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=r"holds no complete checkpoint"):
        workdirs.evaluate_workdir(tmp_path)


def test_pauses_are_in_no_rate(tmp_path, monkeypatch):
    """5 steps of 8 images in 10 s, of which 4 went into saving and validating."""
    now = [0.0]
    monkeypatch.setattr(metric_logger.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(metric_logger.MetricLogger, "_draw", lambda self: None)
    settings = serialization.default_config().log
    with metric_logger.MetricLogger(tmp_path, settings, 0, np.ones(10), 8) as log:
        for begin, end in ((2.0, 5.0), (8.0, 9.0)):
            now[0] = begin
            with log.paused():
                now[0] = end
        now[0] = 10.0
        log.write(5, {"loss": 1.0})
    assert losses(tmp_path, but=())[0]["images_per_second"] == round(5 * 8 / 6, 3)
