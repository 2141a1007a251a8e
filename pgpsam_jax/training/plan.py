"""How a run trains: its configuration, resolved once into typed parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgpsam_jax.config.defaults import total_steps
from pgpsam_jax.config.optimizer import OptimConfig
from pgpsam_jax.data.augmentation.augment import AugmentConfig
from pgpsam_jax.methods.registry import Training, key_of, method_of
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.lbfgs_step import make_fit_step
from pgpsam_jax.training.optimizer import learning_rate_schedule, make_optimizer
from pgpsam_jax.training.train_step import StepConfig, make_train_step


def mesh_of(sizes: ConfigDict, model: ConfigDict, batch_size: int, devices=None) -> Mesh:
    """Returns the mesh of `config.mesh`.

    Args:
      sizes: `config.mesh`.
      model: `config.model`.
      batch_size: slices per step.
      devices: all by default.

    Raises:
      UserError: the encoder or the batch is not divisible over the mesh, or the encoder is not that
        of its base.
    """
    mesh = device_mesh.make_mesh(**sizes, devices=devices)
    method = method_of(model)
    heads = width = mesh.size  # without SAM, only the batch must divide
    if method.base_tensors:
        encoder = method.sam_config(model).encoder
        heads, width = encoder.heads, encoder.width
    device_mesh.check(mesh, model.encoder, heads, width, batch_size)
    return mesh


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How a run trains.

    Attributes:
      method: key of `registry.METHODS`, for sharding rules.
      training: SGD, an L-BFGS fit, or none.
      step: settings of the pure train step.
      optimizer: settings of the optimizer and its schedule.
      batch_size: slices per step over all devices.
      epochs, steps: length of the run; steps > 0 override epochs.
    """

    method: tuple[str, str]
    training: Training
    step: StepConfig
    optimizer: OptimConfig
    batch_size: int
    epochs: int
    steps: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "TrainingPlan":
        """Resolves a configuration; refuses invalid settings of the step."""
        method, train = method_of(config.model), config.train
        step = StepConfig(
            augment=AugmentConfig(**config.augment),
            ce_weight=train.ce_weight,
            dice_weight=train.dice_weight,
            microbatches=train.microbatches,
            loss=method.loss,
            encoded=train.encoded_copies,
        )
        length = train.batch_size, train.epochs, train.steps
        optimizer = OptimConfig(**config.optim)
        return cls(key_of(config.model), method.training, step, optimizer, *length)

    def total_steps(self, epoch_size: int) -> int:
        """Returns the steps of the whole run: 1 for a fit, 0 without training.

        Args:
          epoch_size: slices of the few-shot list.
        """
        match self.training:
            case Training.LBFGS:
                return 1
            case Training.NONE:
                return 0
        return total_steps(self.steps, self.epochs, self.batch_size, epoch_size)

    def slices_per_step(self, epoch_size: int) -> int:
        """Returns the slices per step: a batch, or for a fit the whole few-shot list."""
        return epoch_size if self.training is Training.LBFGS else self.batch_size

    def make_optimizer(self, epoch_size: int) -> optax.GradientTransformation:
        """Returns the optimizer with the schedule of the whole run."""
        steps = max(1, self.total_steps(epoch_size))  # without training, it has no parameters
        return make_optimizer(self.optimizer, steps)

    def make_step(self, graphdef, optimizer):
        """Returns the pure step (state, frozen, batch) -> (state, metrics) of the method."""
        make = make_fit_step if self.training is Training.LBFGS else make_train_step
        return make(graphdef, optimizer, self.step)

    def learning_rates(self, epoch_size: int) -> np.ndarray:
        """Returns the learning rate of each step, (steps,) float32, NaN for a fit."""
        total = self.total_steps(epoch_size)
        if self.training is not Training.SGD:
            return np.full(total, np.nan, np.float32)
        schedule = learning_rate_schedule(self.optimizer, total)
        return np.asarray(jax.jit(schedule)(jnp.arange(total)))
