"""AdamW or Adam, linear warm-up and a decay by name, stepped per iteration (methods.md 1.12, 3)."""

import dataclasses
import math

import jax.numpy as jnp
import optax

from pgpsam_jax.errors import UserError

OPTIMIZERS = ("adamw", "adam")
# Name -> share of the way from peak to final that is left, by progress (0 to 1) and exponent.
DECAYS = {
    "cosine": lambda progress, power: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "polynomial": lambda progress, power: (1 - progress) ** power,
    "constant": lambda progress, power: jnp.ones_like(progress),
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimiser settings; the defaults are the paper's and its release's.

    Attributes:
      name: `adamw`, or `adam`, whose weight decay is added to the gradient.
      learning_rate: peak, reached at the end of the warm-up.
      weight_decay: on *every* trained parameter (norms, biases and prototypes too), as PyTorch
        does; adamw's is decoupled and scaled by the learning rate.
      warmup_fraction, warmup_max_steps: warm-up length = the smaller of the two.
      decay: one of `DECAYS`, how the learning rate falls after the warm-up.
      decay_horizon: length of the decay in lengths of the run; beyond 1, it is cut off.
      decay_power: exponent of the polynomial decay.
      final_learning_rate: where the decay ends.
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

    def __post_init__(self):
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            _refuse(
                f"final_learning_rate is {self.final_learning_rate}; keep it from 0 to "
                f"learning_rate ({self.learning_rate})"
            )
        if not 0 <= self.warmup_fraction <= 1 or self.warmup_max_steps < 0:
            _refuse("warmup_fraction goes from 0 to 1 and warmup_max_steps from 0")
        for field, known in (("name", OPTIMIZERS), ("decay", DECAYS)):
            if getattr(self, field) not in known:
                _refuse(f"{field} is {getattr(self, field)!r}; choose from {', '.join(known)}")
        if self.decay_horizon < 1 or self.decay_power <= 0:
            _refuse("decay_horizon is 1 or more, decay_power above 0")
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

    t < T_w: peak * (t + 1) / T_w; then final + (peak - final) * decay((t - T_w) / (T - T_w)), with
    T `decay_horizon` times the run; beyond T it stays at the final value.
    """
    if total_steps < 1:
        _refuse(f"the run has {total_steps} steps; it needs at least one")
    peak, final, decay = config.learning_rate, config.final_learning_rate, DECAYS[config.decay]
    warm = warmup_steps(config, total_steps)
    length = max(config.decay_horizon * total_steps - warm, 1)

    def schedule(step):
        rising = peak * (step + 1) / max(warm, 1)
        progress = jnp.clip((step - warm) / length, 0, 1)
        falling = final + (peak - final) * decay(progress, config.decay_power)
        return jnp.where(step < warm, rising, falling)

    return schedule


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimiser of all parameters it is given, over a run of `total_steps`."""
    steps, schedule = [], learning_rate_schedule(config, total_steps)
    moments = dict(b1=config.beta1, b2=config.beta2, eps=config.eps)
    if config.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adam":
        steps += [optax.add_decayed_weights(config.weight_decay), optax.adam(schedule, **moments)]
    else:
        steps.append(optax.adamw(schedule, weight_decay=config.weight_decay, **moments))
    return optax.chain(*steps)
