"""The pure steps that loop, benchmark, ahead-of-time compiler and tests share.

State is split once: `params` (what the filter trains), `frozen` (the rest), optimiser state and
step. Gradients are taken with respect to `params` only, so no dW of a frozen weight exists.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pgpsam_jax.data.augment import AugmentConfig, augment, sample_keys
from pgpsam_jax.losses import deep_supervision_loss
from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.mask_decoder import upsample_logits
from pgpsam_jax.parameters import trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a step changes: parameters that train, their optimiser state, the step counter.

    `seed` and `epoch_size` (few-shot slices) stay as they are. They are carried, not compiled in,
    so that another seed or list reuses the compiled step.
    """

    params: nnx.State
    opt_state: Any
    step: jax.Array
    seed: jax.Array
    epoch_size: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Static settings of the training step.

    microbatches: the batch goes through the model in so many parts, one after the other, and
    their gradients are averaged: less memory for the same batch. Soft Dice then sums over each
    part, so that this is close to, not the same as, the whole batch at once.
    """

    augment: AugmentConfig
    ce_weight: float = 0.2
    dice_weight: float = 0.8
    microbatches: int = 1


def split_model(model: nnx.Module, encoder_mode: str):
    """(graphdef, params, frozen): the model apart, by the one filter of what trains."""
    return nnx.split(model, trainable(encoder_mode), ...)


def init_state(
    params, optimizer: optax.GradientTransformation, *, seed: int, epoch_size: int
) -> TrainState:
    """A fresh training state around `params`."""
    step, seed, epoch_size = (jnp.array(n, jnp.int32) for n in (0, seed, epoch_size))
    return TrainState(params, optimizer.init(params), step, seed, epoch_size)


def to_input(images):
    """Grey slices (B, H, W) in [0, 1] to the three equal channels SAM takes, (B, H, W, 3)."""
    return jnp.repeat(images.astype(wide(images.dtype))[..., None], 3, axis=-1)


def loss_of(graphdef, params, frozen, images, labels, epoch, config: StepConfig):
    """(loss, metrics) of a batch: images (B, S, S) in [0, 1], labels (B, S, S) class ids."""
    outputs = nnx.merge(graphdef, params, frozen)(to_input(images))
    outputs["final"] = upsample_logits(outputs["final"], labels.shape[1:])
    return deep_supervision_loss(outputs, labels, epoch, config.ce_weight, config.dice_weight)


def gradients_of(graphdef, params, frozen, images, labels, epoch, config: StepConfig):
    """(gradients of `loss_of` to `params`, metrics), over the microbatches of the batch."""
    parts = config.microbatches
    differentiate = jax.grad(loss_of, argnums=1, has_aux=True)

    def of_part(images, labels):
        return differentiate(graphdef, params, frozen, images, labels, epoch, config)

    if parts == 1:
        return of_part(images, labels)

    def deal(x):  # every device keeps its own rows
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    dealt = deal(images), deal(labels)
    shapes = jax.eval_shape(of_part, *(x[0] for x in dealt))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, dealt)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def make_train_step(graphdef, optimizer: optax.GradientTransformation, config: StepConfig):
    """Pure function (state, frozen, batch) -> (state, metrics), to be jitted by the caller.

    batch: `image` (B, S, S) in [0, 1] and `label` (B, S, S), the global batch; or a whole data set
    of N slices that stays on the device, with `rows` (B,), those the batch consists of.
    Augmentation keys depend on (seed, step, row of the global batch) only.
    """

    def train_step(state: TrainState, frozen, batch):
        images, labels = batch["image"], batch["label"]
        if "rows" in batch:
            images, labels = (x.at[batch["rows"]].get(mode="clip") for x in (images, labels))
        images, labels = images.astype(wide(images.dtype)), labels.astype(jnp.int32)
        size = images.shape[0]
        keys = sample_keys(jax.random.key(state.seed), state.step, jnp.arange(size))
        images, labels = augment(keys, images, labels, config.augment)
        epoch = (state.step * size) // state.epoch_size

        gradients, metrics = gradients_of(
            graphdef, state.params, frozen, images, labels, epoch, config
        )
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return train_step


def make_predict_step(graphdef):
    """Pure function (params, frozen, images (B, S, S)) -> final logits (B, S / 4 ..., K)."""

    def predict_step(params, frozen, images):
        return nnx.merge(graphdef, params, frozen)(to_input(images))["final"]

    return predict_step
