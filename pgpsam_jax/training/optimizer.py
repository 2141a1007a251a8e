"""AdamW or Adam with linear warm-up and a named decay, updated every step.

Source: docs/release_code.md#loss-schedule-and-selection, docs/methods.md#samed.
"""

import math

import jax.numpy as jnp
import optax

from pgpsam_jax.config.optimizer import OptimConfig, refuse

# Name -> remaining fraction of the decay from peak to final, by progress (0 to 1) and exponent.
_DECAYS = {
    "cosine": lambda progress, power: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "polynomial": lambda progress, power: (1 - progress) ** power,
    "constant": lambda progress, power: jnp.ones_like(progress),
}


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Returns min(fraction of the run, maximum); 0 for runs too short for a single step."""
    # The small term absorbs rounding: 0.29 * 100 is 28.999999999999996.
    fraction = math.floor(config.warmup_fraction * total_steps + 1e-9)
    return min(fraction, config.warmup_max_steps)


def learning_rate_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the update t = 0, 1, ... of `total_steps`.

    t < T_w: peak * (t + 1) / T_w; then final + (peak - final) * decay((t - T_w) / (T - T_w)), with
    T `decay_horizon` times the run; constant at the final value beyond T.
    """
    if total_steps < 1:
        refuse(f"the run has {total_steps} steps; it needs at least one")
    peak, final, decay = config.learning_rate, config.final_learning_rate, _DECAYS[config.decay]
    warm = warmup_steps(config, total_steps)
    length = max(config.decay_horizon * total_steps - warm, 1)

    def schedule(step):
        rising = peak * (step + 1) / max(warm, 1)
        progress = jnp.clip((step - warm) / length, 0, 1)
        falling = final + (peak - final) * decay(progress, config.decay_power)
        return jnp.where(step < warm, rising, falling)

    return schedule


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of the trainable parameters for a run of `total_steps`."""
    steps, schedule = [], learning_rate_schedule(config, total_steps)
    moments = dict(b1=config.beta1, b2=config.beta2, eps=config.eps)
    if config.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adam":
        steps += [optax.add_decayed_weights(config.weight_decay), optax.adam(schedule, **moments)]
    else:
        steps.append(optax.adamw(schedule, weight_decay=config.weight_decay, **moments))
    return optax.chain(*steps)
