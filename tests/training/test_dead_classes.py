"""Alarms of classes that are never predicted: when they are raised, and over a resumed run."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.config import default_config
from pgpsam_jax.data.dataset import ValidationData
from pgpsam_jax.errors import UserError
from pgpsam_jax.training import model_selection
from pgpsam_jax.training.dead_classes import DeadClassMonitor

NAMES = ("background", "liver", "spleen", "gallbladder")
TRUTH = np.array([[[0, 1], [2, 2]]], np.uint8)  # no gallbladder


def picture(*classes):
    """A label map with these classes and background."""
    return np.array([[[0, *classes]]], np.uint8)


@settings(max_examples=100, deadline=None)
@given(
    seen=st.lists(st.sets(st.sampled_from([1, 2, 3])), min_size=1, max_size=12),
    limit=st.integers(1, 6),
    every=st.sampled_from([1, 2, 0.5]),
)
def test_alarm_and_all_clear_once_per_silence(seen, limit, every):
    """Against the plain count of epochs since a class was last found."""
    watch = DeadClassMonitor(NAMES, TRUTH, limit)
    last, dead = {1: 0.0, 2: 0.0}, set()
    for n, classes in enumerate(seen, start=1):
        epoch = n * every
        lines = watch.update(picture(*classes), epoch)
        last |= {i: epoch for i in classes & {1, 2}}
        now = {i for i in last if epoch - last[i] >= limit}
        expected = [NAMES[i] for i in sorted(now ^ dead)]
        assert [name for line in lines for name in NAMES if name in line] == expected
        assert [line.startswith("!!!") for line in lines] == [i in now for i in sorted(now ^ dead)]
        silent = {f"silent_epochs_{NAMES[i]}": epoch - t for i, t in last.items() if epoch > t}
        assert watch.record == silent
        dead = now


def test_zero_epochs_never_alarm_but_are_recorded():
    watch = DeadClassMonitor(NAMES, TRUTH, 0)
    assert [watch.update(picture(1), epoch) for epoch in (1, 1000)] == [[], []]
    assert watch.record == {"silent_epochs_spleen": 1000.0}


class Finds:
    """In place of a predictor."""

    def __init__(self, *classes):
        self.classes, self.params = classes, {"w": np.zeros(1, np.float32)}

    def slices(self, images):
        return np.array([[[self.classes[0], self.classes[0]], [self.classes[-1]] * 2]], np.uint8)


def selection(workdir, dead_epochs=3):
    validation = default_config().validation
    validation.every_epochs, validation.dead_epochs = 1, dead_epochs
    data = ValidationData(None, TRUTH, "", num_classes=len(NAMES), cases=1)
    return model_selection.Selection(validation, data, workdir, 2, 4, 100, NAMES)


def test_a_resumed_run_goes_on_counting(tmp_path, capsys):
    """Two steps are an epoch here. What was recorded after the step that it restarts from is of a
    run that never was: the record of step 9, of a file that nobody has cut yet, does not count."""
    one, records = selection(tmp_path), []
    for step in (2, 4):
        score = one.evaluate(Finds(1), step)
        records.append({"step": step, "validation_score": score} | one.never_predicted)
    one.close()
    assert records[-1]["silent_epochs_spleen"] == 2.0
    records += [{"step": 5, "loss": 1.0}, {"step": 9, "validation_score": 1.0}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    two = selection(tmp_path)
    capsys.readouterr()
    two.evaluate(Finds(1), 6)
    said = capsys.readouterr().out
    assert "!!! DEAD CLASS: no pixel of the validation cases was predicted as spleen" in said
    assert "(class 2) for 3 epochs" in said and "liver" not in said
    two.evaluate(Finds(1), 8)
    assert "DEAD" not in capsys.readouterr().out and two.never_predicted == {
        "silent_epochs_spleen": 4.0
    }
    two.evaluate(Finds(1, 2), 10)
    assert "spleen (class 2) is predicted again, after 4 epochs" in capsys.readouterr().out
    assert two.never_predicted == {}
    two.close()


def test_a_negative_number_of_epochs_is_refused(tmp_path):
    config = default_config()
    config.validation.dead_epochs = -1
    with pytest.raises(UserError, match=r"validation\.dead_epochs is -1; give a number of epochs"):
        model_selection.check(config.validation, config.data, None)
