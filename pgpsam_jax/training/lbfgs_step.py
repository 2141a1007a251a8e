"""A fit in place of training: one step, over the whole few-shot list, to the minimum of the loss.

For methods of which so little trains that the loss is convex in it: the encoder sees every slice
once, as it is, and L-BFGS takes all of them in every iteration. The run around it is that of any
method: its first checkpoint is its last.
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

ITERATIONS, TOLERANCE = 1000, 1e-4  # scikit-learn's for FSSP: the largest slope of the mean loss
UNKNOWN = -1  # share of a class in what fills up the last part of the list


class Minimum(NamedTuple):
    """Parameters, how many iterations led to them, and the largest slope that is left."""

    params: object
    iterations: jax.Array
    slope: jax.Array


def minimize(loss, params, *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE):
    """The `Minimum` of a smooth function of a tree by L-BFGS, until all slopes are small."""
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
    """As `step.make_train_step`, for a model whose `encode` does not depend on what trains.

    batch: the whole list on the device; `rows` say how many slices the encoder takes at a time.
    The optimiser and the augmentation of the run have no part in it.
    """

    def fit_step(state: TrainState, frozen, batch):
        if "rows" not in batch:
            raise UserError(
                "this method is fitted to all slices of the few-shot list at once, which are too "
                "many for data.resident_gib; raise it, or choose fewer slices"
            )
        size, labels = len(batch["rows"]), batch["label"]
        count = len(labels) // max(config.encoded, 1)  # of copies, the first
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
