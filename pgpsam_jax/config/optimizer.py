"""Validated optimizer settings."""

import dataclasses
from typing import NoReturn

from pgpsam_jax.errors import UserError

OPTIMIZERS, DECAYS = ("adamw", "adam"), ("cosine", "polynomial", "constant")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer settings; the defaults are those of the paper and its release.

    Attributes:
      name: `adamw`, or `adam`, whose weight decay is added to the gradient.
      learning_rate: peak, reached at the end of the warm-up.
      weight_decay: on *all* trainable parameters (norms, biases and prototypes too), as in
        PyTorch; adamw's is decoupled and scaled by the learning rate.
      warmup_fraction, warmup_max_steps: fraction of the run and steps; the smaller counts.
      decay: "cosine", "polynomial" or "constant", after the warm-up.
      decay_horizon: length of the decay relative to the run; beyond 1, it is cut off.
      decay_power: exponent of the polynomial decay.
      final_learning_rate: at the end of the decay.
      beta1, beta2, eps: of the moments, as in Adam.
      clip_norm: bound on the global gradient norm; None = off.
    """

    name: str = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_fraction: float = 0.1
    warmup_max_steps: int = 250
    decay: str = "cosine"
    decay_horizon: float = 1.0
    decay_power: float = 0.9
    final_learning_rate: float = 1e-6
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            refuse(
                f"final_learning_rate is {self.final_learning_rate}; keep it from 0 to "
                f"learning_rate ({self.learning_rate})"
            )
        if not 0 <= self.warmup_fraction <= 1 or self.warmup_max_steps < 0:
            refuse("keep warmup_fraction from 0 to 1 and warmup_max_steps at 0 or more")
        for field, known in (("name", OPTIMIZERS), ("decay", DECAYS)):
            if getattr(self, field) not in known:
                refuse(f"{field} is {getattr(self, field)!r}; choose from {', '.join(known)}")
        if self.decay_horizon < 1 or self.decay_power <= 0:
            refuse("keep decay_horizon at 1 or more and decay_power above 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            refuse(f"clip_norm is {self.clip_norm}; give a positive norm, or None for no clipping")


def refuse(problem: str) -> NoReturn:
    raise UserError(f"optimizer settings: {problem}.")
