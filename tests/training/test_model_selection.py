"""Selection of parameters: when it validates, what it keeps, and what becomes of it on resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.checkpointing import best_parameters
from pgpsam_jax.config import default_config
from pgpsam_jax.data.dataset import ValidationData
from pgpsam_jax.training import model_selection

LABELS = np.ones((1, 1, 10), np.uint8)


class Scripted:
    """In place of a predictor: finds `right` of 10 pixels, hence Dice 2 right / (right + 10)."""

    def __init__(self, right):
        self.right, self.params = right, {"w": jnp.full(3, right, jnp.float32)}

    def slices(self, images):
        assert images == "images"
        return (np.arange(10) < self.right).astype(np.uint8)[None, None]

    @property
    def score(self):
        return 2 * self.right / (self.right + 10)


def selection(workdir, every=1, batch_size=4, epoch_size=4, total=100):
    validation = default_config().validation
    validation.every_epochs = every
    data = ValidationData("images", LABELS, "digest", num_classes=2, cases=1)
    return model_selection.Selection(validation, data, workdir, batch_size, epoch_size, total)


def kept(workdir):
    """(record, value of the parameters) in the folder."""
    abstract = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.zeros(3).sharding)}
    params = best_parameters.restore_params(workdir, abstract, best=True)
    return best_parameters.best_record(workdir), float(params["w"][0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 30), st.integers(1, 60))
def test_due_after_every_so_many_epochs_and_at_the_end(
    folder, every, batch_size, epoch_size, total
):
    one = selection(folder, every, batch_size, epoch_size, total)
    one.close()
    due, seen, last = [], 0, 0
    for step in range(1, total + 1):
        seen += batch_size
        epochs = seen // epoch_size  # complete
        if epochs // every > last or step == total:
            due.append(step)
        last = epochs // every
    assert [step for step in range(1, total + 1) if one.should_validate(step)] == due


def test_the_settings_that_decide_when(tmp_path):
    one = selection(tmp_path, every=2, batch_size=3, epoch_size=6, total=9)  # 4 steps
    assert [step for step in range(1, 10) if one.should_validate(step)] == [4, 8, 9]
    one.close()


def test_only_an_improvement_replaces_the_best(tmp_path, capsys):
    one = selection(tmp_path)
    for step, right in enumerate((3, 2, 6, 6, 5), start=1):
        predictor = Scripted(right)
        assert one.evaluate(predictor, step) == pytest.approx(predictor.score)
    one.close()
    record, value = kept(tmp_path)
    assert record == {"step": 3, "score": 0.75} and value == 6
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "step 3: validation Dice 0.7500, the best so far"
    assert said[4] == f"step 5: validation Dice {10 / 15:.4f}, best 0.7500 at step 3"
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_a_score_of_nothing_is_kept_too(tmp_path):
    """A model that finds nothing at first: still there is something to go on with."""
    one = selection(tmp_path)
    one.evaluate(Scripted(0), 1)
    one.close()
    assert kept(tmp_path) == ({"step": 1, "score": 0.0}, 0.0)


def test_resumed_before_the_best_step(tmp_path):
    """The best may be of a later step than the checkpoint; a better one of an earlier step wins."""
    one = selection(tmp_path)
    one.evaluate(Scripted(4), 9)
    one.close()
    two = selection(tmp_path)
    two.evaluate(Scripted(3), 8)
    assert two._best.record["step"] == 9
    two.evaluate(Scripted(4), 9)  # the same again, as a resumed run computes it
    two.evaluate(Scripted(5), 7)
    two.close()
    record, value = kept(tmp_path)
    assert record["step"] == 7 and value == 5


def test_what_is_used_is_said(tmp_path):
    config = default_config()
    assert best_parameters.notice(config.validation, tmp_path) is None
    config.validation.every_epochs = 1
    assert "selected no parameters yet" in best_parameters.notice(config.validation, tmp_path)
    assert not (tmp_path / "best").exists()  # looking leaves nothing behind
    one = selection(tmp_path)
    one.evaluate(Scripted(6), 12)
    one.close()
    said = best_parameters.notice(config.validation, tmp_path)
    assert "from step 12, the best on the validation cases" in said and "slice Dice 0.7500" in said
    config.validation.every_epochs = 0
    assert best_parameters.notice(config.validation, tmp_path) is None
