"""A run whose loss has hardly fallen says so; one that learns, or is short, does not."""

import numpy as np
import pytest

from pgpsam_jax.training.stagnation import stagnation


def said(losses, every=10):
    """What a run says at its end, given the loss of each step, of which some are recorded."""
    steps = range(every, len(losses) + 1, every)
    return stagnation([{"step": step, "loss": float(losses[step - 1])} for step in steps])


def noisy(curve, seed):
    return curve + np.random.default_rng(seed).normal(0, 0.05, len(curve))


@pytest.mark.parametrize("steps", [300, 3000])
def test_a_falling_loss_is_silent(steps):
    time = np.arange(steps) / steps
    early = 0.3 + 0.7 * np.exp(-np.arange(steps) / 50)  # in the first hundred steps
    for seed in range(20):
        for curve in (0.4 + 0.6 * np.exp(-8 * time), 1 - 0.5 * time, early):
            assert said(noisy(curve, seed)) is None


@pytest.mark.parametrize("steps", [300, 3000])
def test_a_rising_loss_is_named(steps):
    for seed in range(20):
        text = said(noisy(1 + np.arange(steps) / steps, seed))
        assert text.startswith("!!! the loss has hardly fallen: median ") and "verify" in text
        assert "\n" not in text


def test_a_constant_loss_is_named():
    assert "median 1 of the first 3 records, 1 of the last 3;" in said(np.ones(300))
    flat = [said(noisy(np.ones(3000), seed)) for seed in range(20)]
    assert sum(text is not None for text in flat) >= 17  # by chance it is a little lower


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (4, 1), (99, 1), (190, 10), (9, 10)])
def test_short_runs_get_no_verdict(steps, every):
    assert said(np.linspace(1, 2, steps), every) is None
