"""Fits a method in one step: minimizes the loss over the whole few-shot list with L-BFGS.

For methods whose loss is convex in the trainable parameters. The encoder sees each slice once,
without augmentation; every L-BFGS iteration uses all slices. The run has a single checkpoint.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.losses import class_shares
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.sharding.context import split_batch
from pgpsam_jax.training.train_state import TrainState
from pgpsam_jax.training.train_step import StepConfig, loss_of

# scikit-learn's for FSSP; the tolerance bounds the largest gradient component of the mean loss.
ITERATIONS, TOLERANCE = 1000, 1e-4
UNKNOWN = -1  # class share of the padding after the last slice


class Minimum(NamedTuple):
    """Parameters, the number of iterations, and the largest remaining gradient component."""

    params: object
    iterations: jax.Array
    slope: jax.Array


def minimize(loss, params, *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE):
    """Minimizes a smooth function of a tree with L-BFGS.

    Args:
      loss: tree -> scalar.
      params: the starting point.
      iterations: at most.
      tolerance: stops once no gradient component is larger.
    """
    search = optax.lbfgs()
    value_and_slope = optax.value_and_grad_from_state(loss)

    def steepest(state):
        return optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)

    def unfinished(carry):
        _, state, done = carry
        return (done == 0) | ((done < iterations) & (steepest(state) > tolerance))

    def iterate(carry):
        params, state, done = carry
        value, slope = value_and_slope(params, state=state)
        updates, state = search.update(slope, state, params, value=value, grad=slope, value_fn=loss)
        return optax.apply_updates(params, updates), state, done + 1

    params, state, done = jax.lax.while_loop(
        unfinished, iterate, (params, search.init(params), jnp.array(0, jnp.int32))
    )
    return Minimum(params, done, steepest(state))


def make_fit_step(graphdef, optimizer: optax.GradientTransformation, config: StepConfig):
    """Like `make_train_step`, for models whose `encode` has no trainable parameters.

    `batch` holds the whole list on the device; the length of its `rows` is the number of slices
    encoded at a time. Optimizer and augmentation are not used.
    """

    def fit_step(state: TrainState, frozen, batch):
        if "rows" not in batch:
            raise UserError(
                "this method is fitted to all slices of the few-shot list at once, which exceed "
                "data.resident_gib; raise it, or choose fewer slices"
            )
        size, labels = len(batch["rows"]), batch["label"]
        count = len(labels) // max(config.encoded, 1)  # only the first copy
        labels = labels[:count].astype(jnp.int32)
        filled = -count % size
        model = nnx.merge(graphdef, state.params, frozen)
        if config.encoded:
            features = _filled(batch["encoded"][:count], filled)
        else:
            parts = _filled(batch["image"][:count], filled)
            parts = parts.reshape(-1, size, *parts.shape[1:])
            features = jax.lax.map(lambda part: model.encode(to_input(split_batch(part))), parts)
            features = features.reshape(-1, *features.shape[2:])
        features = split_batch(features.astype(wide(features.dtype)))
        coarse = jax.eval_shape(model.segment, features)["coarse"]
        shares = class_shares(labels, coarse.shape[1:3], coarse.shape[-1])
        shares = split_batch(_filled(shares, filled, UNKNOWN))
        settings = dataclasses.replace(config, encoded=1)

        def judged(params):
            return loss_of(graphdef, params, frozen, features, shares, 0, settings)

        found = minimize(lambda params: judged(params)[0], state.params)
        _, (metrics, _) = judged(found.params)
        metrics |= {"iterations": found.iterations, "gradient_norm": found.slope}
        state = dataclasses.replace(state, params=found.params, step=state.step + 1)
        return state, metrics

    return fit_step


def _filled(x, rows: int, value=0):
    return jnp.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1), constant_values=value)
