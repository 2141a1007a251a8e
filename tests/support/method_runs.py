"""A few real steps of a method on squares, with the smallest encoder: shared by its tests."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx

from pgpsam_jax.config import default_config, method_recipes
from pgpsam_jax.methods import build
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.train_state import init_state
from pgpsam_jax.training.train_step import make_train_step
from tests.support import micro

SIZE, CLASSES = 32, 3


def small_config(name: str, **settings):
    """A method's recipe at 32 px, nothing augmented; settings as `model__prompt="box"`.

    The encoder is the smallest, random, and frozen where the recipe says so.
    """
    config = default_config()
    method_recipes.apply_recipe(config, name)
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


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's first steps over one batch of squares, all by one compiled step."""

    graphdef: nnx.GraphDef
    frozen: nnx.State
    states: tuple  # of training: at the start and after each of the first three steps
    losses: np.ndarray  # (steps,)
    step: Callable  # (state, frozen, batch) -> (state, metrics)

    def slopes(self, state=None) -> dict[str, np.ndarray]:
        """Path to gradient, a tenth of it, at the start or another state: Adam's first moments.

        Weight decay does not touch them.
        """
        after = self.states[1] if state is None else self.step(state, self.frozen, squares())[0]
        moments = np.asarray(optax.tree.get(after.opt_state, "mu"))
        leaves = flat_paths(self.states[0].params)
        parts = np.split(moments, np.cumsum([leaf.size for leaf in leaves.values()])[:-1])
        return {
            path: part.reshape(leaf.shape)
            for (path, leaf), part in zip(leaves.items(), parts, strict=True)
        }


def run_of(name: str, steps: int = 20, **settings) -> Run:
    """The `Run` of a method: a test file that asks for one, however often, compiles one step."""
    return _run_of(name, steps, **settings)


@functools.cache
def _run_of(name: str, steps: int, **settings) -> Run:
    config, batch = small_config(name, train__steps=steps, **settings), squares()
    graphdef, params, frozen, _ = build.init_model(config.model, CLASSES, config.seed)
    # Over one vector: Adam for each of a hundred leaves took a third of the compilation.
    optimizer = optax.flatten(TrainingPlan.from_config(config).make_optimizer(len(batch["label"])))
    step = jax.jit(make_train_step(graphdef, optimizer, TrainingPlan.from_config(config).step))
    state = init_state(params, optimizer, seed=0, epoch_size=len(batch["label"]))
    states, losses = [state], []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        states += [state] if len(states) < 4 else []
    return Run(graphdef, frozen, tuple(states), np.array(losses), step)


def loss_falls(name: str, steps: int = 20, **settings) -> np.ndarray:
    """(steps,) losses of a run's first steps over one batch: finite, the last below the first."""
    losses = run_of(name, steps, **settings).losses
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    return losses
