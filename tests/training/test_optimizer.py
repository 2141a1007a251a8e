"""Learning rate by hand, AdamW against torch, clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgpsam_jax.config.optimizer import OptimConfig
from pgpsam_jax.errors import UserError
from pgpsam_jax.training.optimizer import learning_rate_schedule, make_optimizer, warmup_steps
from tests.support.optional import torch

PEAK, FINAL = 3e-3, 1e-6


def plain_rate(step, total):
    """The schedule of docs/release_code.md#loss-schedule-and-selection in plain Python."""
    warm = min(total // 10, 250)
    if step < warm:
        return PEAK * (step + 1) / warm
    angle = math.pi * (step - warm) / (total - warm)
    return FINAL + 0.5 * (PEAK - FINAL) * (1 + math.cos(angle))


@pytest.mark.parametrize(
    ("total", "step", "rate"),
    [
        (3300, 0, PEAK / 250),
        (3300, 124, PEAK / 2),
        (3300, 249, PEAK),
        (3300, 250, PEAK),
        (3300, 1775, (PEAK + FINAL) / 2),
        (3300, 3300, FINAL),
        (3300, 10_000, FINAL),
        (100, 4, PEAK / 2),
        # 11 steps: one of warm-up, which is at the peak already.
        (11, 0, PEAK),
        (11, 1, PEAK),
        (11, 6, (PEAK + FINAL) / 2),
        (11, 11, FINAL),
        # Fewer than 10 steps: none of warm-up.
        (9, 0, PEAK),
        (2, 1, (PEAK + FINAL) / 2),
        (1, 0, PEAK),
        (1, 1, FINAL),
    ],
)
def test_learning_rate_by_hand(total, step, rate):
    schedule = learning_rate_schedule(OptimConfig(), total)
    np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), rate, rtol=1e-6)


@pytest.mark.parametrize("total", [1, 9, 10, 11, 25, 400])
def test_learning_rate_equals_the_formula_at_every_step(total):
    rates = jax.vmap(learning_rate_schedule(OptimConfig(), total))(jnp.arange(total))
    expected = [plain_rate(step, total) for step in range(total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)


def test_warmup_is_a_whole_number_of_steps_despite_binary_fractions():
    assert warmup_steps(OptimConfig(warmup_fraction=0.29), 100) == 29
    assert warmup_steps(OptimConfig(), 2500) == 250
    assert warmup_steps(OptimConfig(), 2499) == 249
    assert warmup_steps(OptimConfig(warmup_max_steps=0), 2500) == 0
    everything = learning_rate_schedule(OptimConfig(warmup_fraction=1.0), 4)
    np.testing.assert_allclose([everything(t) for t in (0, 3)], [PEAK / 4, PEAK], rtol=1e-6)


def test_three_steps_equal_torch_adamw():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 3), "bias": (3,), "prototypes": (4, 6)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    total = 20
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    torch_optimizer = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    rates = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda t: plain_rate(t, total))
    optimizer = make_optimizer(OptimConfig(), total)
    ours = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    for step in range(3):
        scale = 10.0 ** (-2 * step)  # so that the second moments matter
        gradients = {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}
        updates, state = update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        torch_optimizer.step()
        rates.step()
        for name, parameter in theirs.items():
            expected = parameter.detach().numpy()
            np.testing.assert_allclose(ours[name], expected, rtol=1e-6, atol=1e-6)
            assert np.abs(expected - start[name]).max() > 1e-3


def test_decay_reaches_every_parameter():
    parameters = {"norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}, "table": jnp.ones((2, 2))}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.5), 1)
    nothing = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(nothing, optimizer.init(parameters), parameters)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -0.5 * 0.1, rtol=1e-6)


def test_clipping_bounds_the_joint_norm_and_is_off_by_default():
    # The first moment shows what reached AdamW: (1 - beta1) times the gradient.
    parameters = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    for clip, factor in ((None, 1.0), (1.0, 0.2), (10.0, 1.0)):
        optimizer = make_optimizer(OptimConfig(clip_norm=clip), 10)
        _, state = optimizer.update(gradients, optimizer.init(parameters), parameters)
        moment = optax.tree_utils.tree_get(state, "mu")
        np.testing.assert_allclose(moment["a"], [0.3 * factor, 0], rtol=1e-6)
        np.testing.assert_allclose(moment["b"], [0.4 * factor], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"final_learning_rate": 1.0}, "final_learning_rate"),
        ({"warmup_fraction": 1.5}, "warmup_fraction"),
        ({"clip_norm": 0.0}, "clip_norm"),
    ],
)
def test_impossible_settings_are_refused_with_the_field_named(settings, word):
    with pytest.raises(UserError, match=word):
        OptimConfig(**settings)


def test_a_run_without_steps_is_refused():
    with pytest.raises(UserError, match="0 steps"):
        make_optimizer(OptimConfig(), 0)
