"""The pure train step, shared by train loop, benchmark, ahead-of-time compiler and tests.

Gradients are taken with respect to the trainable `params` only, so no weight gradient of a frozen
parameter exists.
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

_MODEL = 1 << 20  # folded into a sample's key for the model's own random numbers


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Static settings of the train step.

    Attributes:
      augment: settings of the augmentation.
      ce_weight, dice_weight: weights of the two losses.
      microbatches: parts of the batch that are processed in turn, with averaged gradients: less
        memory. Soft Dice is then computed per part, which is close but not equal to the full batch.
      loss: of the method: (outputs, labels (B, S, S), epoch, this) -> (scalar, metrics).
      encoded: number of precomputed augmented copies of each slice; 0 = encode in each step.
    """

    augment: AugmentConfig
    ce_weight: float = 0.2
    dice_weight: float = 0.8
    microbatches: int = 1
    loss: Callable = deep_supervision
    encoded: int = 0


def loss_of(graphdef, params, frozen, inputs, labels, epoch, config: StepConfig, keys=None):
    """Returns (loss, (metrics, running averages of batch statistics)) of a batch.

    Args:
      graphdef, params, frozen: the model.
      inputs: images (B, S, S) in [0, 1]; with `config.encoded`, the encoder's features of them.
      labels: (B, S, S) class ids.
      epoch: full epochs done.
      config: settings.
      keys: (B,) for the model's random numbers in training.
    """
    model = nnx.merge(graphdef, params, frozen)
    outputs = model.segment(inputs, keys) if config.encoded else model(to_input(inputs), keys)
    loss, metrics = config.loss(outputs, labels, epoch, config)
    return loss, (metrics, nnx.state(model, nnx.BatchStat))


def gradients_of(graphdef, params, frozen, inputs, labels, epoch, config: StepConfig, keys=None):
    """Returns the gradients of `loss_of` in `params` and its auxiliary output, microbatched."""
    parts = config.microbatches
    differentiate = jax.grad(loss_of, argnums=1, has_aux=True)

    def of_part(inputs, labels, keys):
        return differentiate(graphdef, params, frozen, inputs, labels, epoch, config, keys)

    batch = inputs, labels, keys
    if parts == 1:
        return of_part(*batch)

    def deal(x):  # each device keeps its rows
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    dealt = jax.tree.map(deal, batch)
    shapes = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], dealt))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, dealt)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def make_train_step(graphdef, optimizer: optax.GradientTransformation, config: StepConfig):
    """Returns the pure function (state, frozen, batch) -> (state, metrics), for the caller to jit.

    `batch` holds the global batch: `image` (B, S, S) in [0, 1] and `label` (B, S, S); or a
    device-resident set of N slices and `rows` (B,), the slices of the batch. With `config.encoded`
    copies, `encoded` replaces `image`, the set holds one copy after the other, and epochs use them
    in turn. Random keys depend only on (seed, step, row of the global batch).
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
