"""Settings of inference: chosen by validation cases, stored with the run, used from then on."""

import json

import numpy as np
import pytest

from pgpsam_jax.config import load_config
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import tune
from pgpsam_jax.evaluation.workdirs import evaluate_workdir
from pgpsam_jax.inference import settings
from pgpsam_jax.inference.settings import PLAIN, InferenceSettings
from pgpsam_jax.inference.trained_run import load_run
from tests.support.ready_run import ready_run
from tests.support.small_run import NAMES, hold_out, write_data

SMOOTH = (0.0, 1.0, 2.0, 3.0)


def scores(value=0.7, **better):
    """Dice of two cases and organs, the same but for settings `"i,j,k"` (and organ) -> Dice."""
    dice = np.full((2, 2, 4, 3, 2), value)
    for place, own in better.items():
        dice[(slice(None), *(int(i) for i in place[1:].split("_")))] = own
    return dice


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        (scores(), PLAIN),
        (scores(_0_2=0.75), InferenceSettings(1, 2.0)),
        (scores(_1=0.7005), PLAIN),  # five times the work for nothing
        (scores(_1_1=0.8), InferenceSettings(5, 1.0)),
        (scores(_1_1=0.8, _0_3=0.7995), InferenceSettings(1, 3.0)),  # as good, and cheaper
        (scores(_0_0_2_1=0.72), InferenceSettings(components=(0.0, 1.0))),
        (scores(_0_0_1_0=0.72, _0_0_2_0=0.71), InferenceSettings(components=(0.3, 0.0))),
        (scores(_0_1_2_0=0.9), InferenceSettings(1, 1.0, (1.0, 0.0))),  # good together
        (scores(_0_1_2_0=0.7015), PLAIN),  # for a class mean of 0.0008 more
    ],
)
def test_the_cheapest_of_the_best_is_chosen(dice, chosen):
    assert tune.choose(dice, SMOOTH) == chosen


def test_an_organ_that_no_case_has_decides_nothing():
    dice = scores(_0_2=0.75)
    dice[..., 1] = np.nan
    assert tune.choose(dice, SMOOTH) == InferenceSettings(1, 2.0)


def test_cases_without_any_organ_are_refused():
    with pytest.raises(UserError, match="no validation case has an organ"):
        tune.choose(scores(np.nan), SMOOTH)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run with a validation case."""
    root = write_data(tmp_path_factory.mktemp("data"), "abcd")
    hold_out(root, "c")
    return ready_run(root, tmp_path_factory.mktemp("run"), evaluated=False)


def test_a_run_keeps_what_was_chosen(run, capsys, monkeypatch):
    monkeypatch.setattr(tune, "choose", lambda *_: InferenceSettings(5, 2.0, (1.0, 0.0)))
    tune.main([str(run)])
    said = capsys.readouterr().out
    assert "over 1 validation cases" in said and "| 5 " in said
    stored = json.loads((run / settings.FILE).read_text())
    assert stored["chosen_on"] == ["c"] and len(stored["dice"]) == 2 * 4 * 3
    assert stored["components"] == {"liver": 1.0, "spleen": 0.0}
    loaded = load_run(run)
    assert loaded.predictor.settings == InferenceSettings(5, 2.0, (1.0, 0.0))
    assert "5 shifted passes" in loaded.identity["parameters"]  # masks of others are kept apart
    summary = evaluate_workdir(run)
    wanted = (
        "Masks are averaged over 5 shifted passes, smoothed by 2 mm across slices, without "
        "components below liver 100% of the largest."
    )
    assert wanted in summary["notices"]
    config = load_config(run)
    config.eval.shifts, config.eval.smooth, config.eval.components = 1, 0.0, 0.0
    assert not any("Masks are" in text for text in evaluate_workdir(run, config)["notices"])


def test_the_scores_are_those_of_evaluation(run):
    """The table's plain line is the Dice that `evaluate` finds for the same case."""
    (run / settings.FILE).unlink(missing_ok=True)
    chosen = tune.tune(run)
    stored = json.loads((run / settings.FILE).read_text())
    by = {(d["shifts"], d["smooth_mm"], d["components"]): d["class_mean"] for d in stored["dice"]}
    loaded = load_run(run)
    split = tune.dataset.find_split(loaded.config.data)
    for fields in (PLAIN, InferenceSettings(5), InferenceSettings(1, 4.0, (1.0, 1.0))):
        (case,) = split.validation
        volume, truth = tune.read_case(case, split.table, loaded.config.data.axis)
        ids = loaded.predictor.with_settings(fields)(volume)
        dice = [
            2 * ((ids == k) & (truth == k)).sum() / ((ids == k).sum() + (truth == k).sum())
            for k in (1, 2)
        ]
        share = fields.components[0] if fields.components else 0.0
        assert by[fields.shifts, fields.smooth, share] == pytest.approx(np.mean(dice), abs=1e-12)
    assert isinstance(chosen, InferenceSettings)


def test_a_run_without_validation_cases_is_refused(tmp_path):
    root = write_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    workdir = ready_run(root, tmp_path / "run", evaluated=False)
    with pytest.raises(UserError, match="has no validation cases to choose by"):
        tune.tune(workdir)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is not what pgpsam tune writes"),
        ('{"shifts": 5, "smooth_mm": 1, "components": {"liver": 1}}', "is not what pgpsam tune"),
        ('{"shifts": 4, "smooth_mm": 1, "components": {"liver": 1, "spleen": 0}}', "eval.shifts"),
        ('{"shifts": 1, "smooth_mm": -1, "components": {"liver": 1, "spleen": 0}}', "eval.smooth"),
        ('{"shifts": 1, "smooth_mm": 0, "components": {"liver": 7, "spleen": 0}}', "eval.comp"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    (tmp_path / settings.FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        settings.read(tmp_path, NAMES)
