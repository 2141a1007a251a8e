"""AdamW with linear warm-up and cosine decay, stepped per iteration (methods.md 1.12)."""

import dataclasses
import math

import jax.numpy as jnp
import optax

from pgpsam_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser settings; the defaults are the paper's and its release's.

    Attributes:
      learning_rate: peak, reached at the end of the warm-up.
      weight_decay: decoupled, scaled by the learning rate, on *every* trained parameter (norms,
        biases and prototypes too), as `torch.optim.AdamW` does.
      warmup_fraction, warmup_max_steps: warm-up length = the smaller of the two.
      final_learning_rate: where the cosine ends.
      clip_norm: bound on the global gradient norm; None = off.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_fraction: float = 0.1
    warmup_max_steps: int = 250
    final_learning_rate: float = 1e-6
    clip_norm: float | None = None

    def __post_init__(self):
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            _refuse(
                f"final_learning_rate is {self.final_learning_rate}; keep it from 0 to "
                f"learning_rate ({self.learning_rate})"
            )
        if not 0 <= self.warmup_fraction <= 1 or self.warmup_max_steps < 0:
            _refuse("warmup_fraction goes from 0 to 1 and warmup_max_steps from 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            _refuse(f"clip_norm is {self.clip_norm}; give a positive norm, or None for no clipping")


def _refuse(problem: str):
    raise UserError(f"optimiser settings: {problem}.")


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """min(fraction of the run, maximum); 0 where the run is too short for a single step of it."""
    # The small term undoes binary fractions: 0.29 * 100 is 28.999999999999996.
    fraction = math.floor(config.warmup_fraction * total_steps + 1e-9)
    return min(fraction, config.warmup_max_steps)


def learning_rate_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update t = 0, 1, ... of `total_steps`.

    t < T_w: peak * (t + 1) / T_w; then final + (peak - final) / 2 * (1 + cos(pi (t - T_w) /
    (T - T_w))); beyond the last step it stays at the final value.
    """
    if total_steps < 1:
        _refuse(f"the run has {total_steps} steps; it needs at least one")
    peak, final = config.learning_rate, config.final_learning_rate
    warm = warmup_steps(config, total_steps)

    def schedule(step):
        rising = peak * (step + 1) / max(warm, 1)
        progress = jnp.clip((step - warm) / max(total_steps - warm, 1), 0, 1)
        falling = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warm, rising, falling)

    return schedule


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW on all parameters it is given, over a run of `total_steps`."""
    steps = []
    if config.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    steps.append(
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    )
    return optax.chain(*steps)
