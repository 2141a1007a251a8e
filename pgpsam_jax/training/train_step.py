"""The pure steps that loop, benchmark, ahead-of-time compiler and tests share.

State is split once: `params` (what the filter trains), `frozen` (the rest), optimiser state and
step. Gradients are taken with respect to `params` only, so no dW of a frozen weight exists.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pgpsam_jax.data.augmentation.augment import AugmentConfig, augment, sample_keys
from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.losses import deep_supervision
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.training.train_state import TrainState

_MODEL = 1 << 20  # what a sample's key is folded with for the model's own draws


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Static settings of the training step.

    loss: the method's, (outputs, labels (B, S, S), epoch, this) -> (scalar, metrics).
    microbatches: the batch goes through the model in so many parts, one after the other, and
    their gradients are averaged: less memory for the same batch. Soft Dice then sums over each
    part, so that this is close to, not the same as, the whole batch at once.
    encoded: 0, or how many augmented copies of every slice were encoded beforehand.
    """

    augment: AugmentConfig
    ce_weight: float = 0.2
    dice_weight: float = 0.8
    microbatches: int = 1
    loss: Callable = deep_supervision
    encoded: int = 0


def loss_of(graphdef, params, frozen, inputs, labels, epoch, config: StepConfig, keys=None):
    """(loss, (metrics, running averages of batch statistics)) of a batch.

    labels (B, S, S) are class ids, inputs images (B, S, S) in [0, 1]; with `config.encoded`, what
    the model's `encode` made of images. keys (B,): for what the model draws in training.
    """
    model = nnx.merge(graphdef, params, frozen)
    outputs = model.segment(inputs, keys) if config.encoded else model(to_input(inputs), keys)
    loss, metrics = config.loss(outputs, labels, epoch, config)
    return loss, (metrics, nnx.state(model, nnx.BatchStat))


def gradients_of(graphdef, params, frozen, inputs, labels, epoch, config: StepConfig, keys=None):
    """(gradients of `loss_of` to `params`, what else it returns), over a batch's microbatches."""
    parts = config.microbatches
    differentiate = jax.grad(loss_of, argnums=1, has_aux=True)

    def of_part(inputs, labels, keys):
        return differentiate(graphdef, params, frozen, inputs, labels, epoch, config, keys)

    batch = inputs, labels, keys
    if parts == 1:
        return of_part(*batch)

    def deal(x):  # every device keeps its own rows
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    dealt = jax.tree.map(deal, batch)
    shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], dealt))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, dealt)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def make_train_step(graphdef, optimizer: optax.GradientTransformation, config: StepConfig):
    """Pure function (state, frozen, batch) -> (state, metrics), to be jitted by the caller.

    batch: `image` (B, S, S) in [0, 1] and `label` (B, S, S), the global batch; or a whole data set
    of N slices that stays on the device, with `rows` (B,), those the batch consists of. With
    `config.encoded` copies, `encoded` is in place of `image`, the set holds all copies, one after
    the other, and epochs take them in turn. Keys depend on (seed, step, row of the global batch)
    only.
    """

    def train_step(state: TrainState, frozen, batch):
        labels = batch["label"]
        inputs = batch["encoded" if config.encoded else "image"]
        size = len(batch.get("rows", labels))
        epoch = (state.step * size) // state.epoch_size
        if "rows" in batch:
            rows = batch["rows"]
            if config.encoded:
                rows += epoch % config.encoded * (len(labels) // config.encoded)
            inputs, labels = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), (inputs, labels))
        labels = labels.astype(jnp.int32)
        keys = sample_keys(jax.random.key(state.seed), state.step, jnp.arange(size))
        if not config.encoded:
            inputs = inputs.astype(wide(inputs.dtype))
            inputs, labels = augment(keys, inputs, labels, config.augment)
        drawing = jax.vmap(lambda key: jax.random.fold_in(key, _MODEL))(keys)
        gradients, (metrics, averages) = gradients_of(
            graphdef, state.params, frozen, inputs, labels, epoch, config, drawing
        )
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = nnx.merge_state(optax.apply_updates(state.params, updates), averages)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return train_step
