"""The state of a training run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Trainable parameters, their optimizer state and the step counter.

    `seed` and `epoch_size` (few-shot slices) are constant; they are carried rather than compiled
    in, so another seed or list reuses the compiled step.
    """

    params: nnx.State
    opt_state: Any
    step: jax.Array
    seed: jax.Array
    epoch_size: jax.Array


def init_state(
    params, optimizer: optax.GradientTransformation, *, seed: int, epoch_size: int
) -> TrainState:
    """Returns the training state before the first step."""
    numbers = (jnp.array(n, jnp.int32) for n in (0, seed, epoch_size))
    return TrainState(params, optimizer.init(params), *numbers)
