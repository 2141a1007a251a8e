"""The short example learns: a few steps at a small size, on two phantoms."""

import functools
import re
import runpy

import pytest

from pgpsam_jax.models.pgpsam import model
from pgpsam_jax.models.sam.sam import SamConfig
from tests.support import micro, tiny_method
from tests.support.places import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "train_minimal.py"


@pytest.mark.parametrize(
    ("method", "share"), [("tiny", 0.98), pytest.param("pgpsam", 0.9, marks=pytest.mark.slow)]
)
def test_the_loss_falls_and_dice_is_printed(method, share, monkeypatch, capsys):
    """With another model all but the model is the example's; PGP-SAM takes long to compile."""
    if method == "tiny":
        make = lambda config, rngs: tiny_method.Tiny(config.sam, config.num_classes, rngs=rngs)  # noqa: E731
        monkeypatch.setattr(model, "PgpSam", make)
    # The smallest encoder and one stage instead of two: there is less to compile.
    preset = functools.partial(SamConfig.preset, micro.NAME)
    monkeypatch.setattr(SamConfig, "preset", lambda _, *sizes, **more: preset(*sizes, **more))
    one_stage = functools.partial(model.PgpSamConfig, stage_taps=(1,))
    monkeypatch.setattr(model, "PgpSamConfig", one_stage)
    runpy.run_path(str(EXAMPLE))["main"](steps=41, size=32, train_cases=1, test_cases=1)
    text = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 3 and losses[-1] < share * losses[0]
    dice = re.findall(r"^(\w+) +Dice (0\.\d+|nan)", text, re.MULTILINE)
    assert len(dice) == 9 and dice[4][0] == "liver" and dice[-1][0] == "mean"


def test_it_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 120
