"""Augmentation on the accelerator: one smooth warp, one resampling and noise per sample.

There are no flips: kidneys, liver and spleen have sides. Letters: `B` samples, `H W` image rows and
columns.
"""

import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.data.augmentation.noise import add_noise
from pgpsam_jax.data.augmentation.warp import bilinear, resample, warp_coordinates


def augmentation_seed(seed: int, config: AugmentConfig) -> int:
    """Returns the run's seed if `config.seeded`, else 31 bits from the operating system.

    All processes get the same seed. Store it with the run: a resumed run needs it again.
    """
    if config.seeded:
        return seed
    return int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))


def sample_keys(key, step, positions):
    """Derives (B,) keys from the seed key, the step and positions in the *global* batch.

    The keys do not depend on the number of devices or processes. `step` may be traced, so a jitted
    train step compiles once.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda position: jax.random.fold_in(step_key, position))(positions)


def augment(keys, images, labels, config: AugmentConfig):
    """Warps each sample by a random transform, then adds noise if configured.

    Args:
        keys: (B,) PRNG keys, from `sample_keys`.
        images: (B, H, W) floating point, 0 at the lower end of the intensity window.
        labels: (B, H, W) integer class ids, 0 = background.

    Returns:
        Images and labels of the same shapes and types.
    """
    one = functools.partial(_augment_one, config=config)
    return jax.vmap(one)(keys, images, labels)


def _augment_one(key, image, label, config):
    warp_key, noise_key = jax.random.split(key)
    if any(config.geometric):
        coordinates, (_, deformed, _) = warp_coordinates(warp_key, image.shape, config)
        ids = label
        image, label = resample(image, ids, coordinates)
        if config.label_warp == "linear" and config.elastic_probability:
            blended = jnp.floor(bilinear(ids.astype(jnp.float32), coordinates) + 0.5)
            label = jnp.where(deformed > 0, blended.astype(ids.dtype), label)
    if any(config.noises):
        image = add_noise(noise_key, image, config)
    return image, label
