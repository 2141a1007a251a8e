"""Step settings, schedule, optimizer and step function of a configuration."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgpsam_jax.config import defaults, exclusive
from pgpsam_jax.config.optimizer import OptimConfig
from pgpsam_jax.data.augmentation.augment import AugmentConfig
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods.registry import Training, method_of
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.lbfgs_step import make_fit_step
from pgpsam_jax.training.optimizer import learning_rate_schedule, make_optimizer
from pgpsam_jax.training.train_step import StepConfig, make_train_step


def check(config: ConfigDict) -> None:
    """Refuse settings with which no step can be made, before anything is read or claimed."""
    step_config(config)
    OptimConfig(**config.optim)
    exclusive.check(config.fewshot)
    exclusive.check_complete(config.fewshot)
    _check_used(config.data)
    copies, trains = config.train.encoded_copies, config.model.train_encoder
    if copies and trains != "frozen":
        raise UserError(
            f"train.encoded_copies is {copies}, but model.train_encoder is {trains!r}: what trains "
            "cannot be encoded beforehand; set train.encoded_copies=0, or "
            "model.train_encoder=frozen"
        )


def _check_used(data: ConfigDict) -> None:
    """Refuse paths that the layout or the split would leave aside."""
    unused = {"split_file": data.split != "file" and ("split", data.split, "file")}
    pairs = data.layout != "pairs" and ("layout", data.layout, "pairs")
    for field, used_by in (unused | dict.fromkeys(("image_glob", "label_glob"), pairs)).items():
        if used_by and data[field]:
            other, value, needed = used_by
            raise UserError(
                f"data.{field} is {data[field]!r}, but data.{other} {value!r} does not use it; set "
                f"data.{other}={needed}, or leave it empty"
            )


def mesh_of(config: ConfigDict, devices=None) -> Mesh:
    """Returns the mesh of `config.mesh` over all devices, or those given.

    Raises:
      UserError: the encoder or the batch does not divide over it.
    """
    mesh = device_mesh.make_mesh(**config.mesh, devices=devices)
    model = config.model
    encoder = SamConfig.preset(model.encoder, model.image_size, model.patch_size).encoder
    device_mesh.check(mesh, model.encoder, encoder.heads, encoder.width, config.train.batch_size)
    return mesh


def step_config(config: ConfigDict) -> StepConfig:
    return StepConfig(
        augment=AugmentConfig(**config.augment),
        ce_weight=config.train.ce_weight,
        dice_weight=config.train.dice_weight,
        microbatches=config.train.microbatches,
        loss=method_of(config.model).loss,
        encoded=config.train.encoded_copies,
    )


def total_steps(config: ConfigDict, epoch_size: int) -> int:
    """Returns the steps of the whole run: 1 for a fit, 0 for methods without training."""
    match method_of(config.model).training:
        case Training.LBFGS:
            return 1
        case Training.NONE:
            return 0
    return defaults.total_steps(config, epoch_size)


def make_step(config: ConfigDict, graphdef, optimizer):
    """Returns the pure step (state, frozen, batch) -> (state, metrics) of the method."""
    fitted = method_of(config.model).training is Training.LBFGS
    make = make_fit_step if fitted else make_train_step
    return make(graphdef, optimizer, step_config(config))


def slices_of_step(config: ConfigDict, epoch_size: int) -> int:
    """Returns the slices per step: a batch, or for a fit the whole few-shot list."""
    fitted = method_of(config.model).training is Training.LBFGS
    return epoch_size if fitted else config.train.batch_size


def optimizer_of(config: ConfigDict, epoch_size: int):
    """The optimiser with the schedule of the whole run."""
    steps = max(1, total_steps(config, epoch_size))  # where nothing trains, it has no parameters
    return make_optimizer(OptimConfig(**config.optim), steps)


def learning_rates(config: ConfigDict, epoch_size: int) -> np.ndarray:
    """(steps,) float32: the learning rate of every step of the run, for the log; NaN of a fit."""
    total = total_steps(config, epoch_size)
    if method_of(config.model).training is not Training.SGD:
        return np.full(total, np.nan, np.float32)
    schedule = learning_rate_schedule(OptimConfig(**config.optim), total)
    return np.asarray(jax.jit(schedule)(jnp.arange(total)))
