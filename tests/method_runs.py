"""A few real steps of a method on squares, with the smallest encoder: shared by its tests."""

import functools

import jax
import micro
import numpy as np

from pgpsam_jax import build, recipes
from pgpsam_jax.config import default_config
from pgpsam_jax.step import init_state, make_train_step

SIZE, CLASSES = 32, 3


def small_config(name: str, **settings):
    """A method's recipe at 32 px, nothing augmented; settings as `model__prompt="box"`.

    The encoder is the smallest, random, and frozen where the recipe says so.
    """
    config = default_config()
    recipes.use(config, name)
    config.model.encoder = micro.NAME
    config.model.image_size, config.model.patch_size = SIZE, 8
    for kind in ("rotate", "scale", "elastic"):
        config.augment[f"{kind}_probability"] = 0.0
    for field, value in settings.items():
        section, name = field.split("__")
        config[section][name] = value
    return config


@functools.cache
def squares(count: int = 8):
    """{"image" (B, S, S) float16, "label" (B, S, S) uint8}: a rectangle of class 1 or 2 in each."""
    rng = np.random.default_rng(0)
    label = np.zeros((count, SIZE, SIZE), np.uint8)
    for i in range(count):
        y, x = rng.integers(1, 9, 2)
        label[i, y : y + 10 + i % 8, x : x + 16] = 1 + i % 2
    image = 0.2 + 0.3 * label + 0.02 * rng.standard_normal(label.shape)
    return {"image": image.astype(np.float16), "label": label}


def loss_falls(name: str, steps: int = 20, **settings) -> np.ndarray:
    """(steps,) losses of a run's first steps over one batch: finite, the last below the first."""
    config, batch = small_config(name, train__steps=steps, **settings), squares()
    graphdef, params, frozen, _ = build.init_model(config, CLASSES)
    optimizer = build.optimizer_of(config, len(batch["label"]))
    step = jax.jit(make_train_step(graphdef, optimizer, build.step_config(config)))
    state = init_state(params, optimizer, seed=0, epoch_size=len(batch["label"]))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    return np.array(losses)
