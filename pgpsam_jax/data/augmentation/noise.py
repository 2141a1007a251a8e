"""The release's three kinds of noise for slices in [0, 1]; at most one of them per sample."""

from statistics import NormalDist

import jax
import jax.numpy as jnp

from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.data.augmentation.sampling import one_of


def add_noise(key, image, config: AugmentConfig):
    """(H, W) floating point in [0, 1] -> the same, with one kind of noise or none."""
    choice_key, value_key = jax.random.split(key)
    # A sample has one kind of noise at most, so the three can read the same random numbers.
    normal = jax.random.normal(value_key, image.shape, image.dtype)
    chosen = one_of(jax.random.uniform(choice_key), config.noises)
    noisy = image
    for n, kind in enumerate((_gaussian, _poisson, _salt_and_pepper)):
        if config.noises[n]:
            noisy = jnp.where(chosen[n], kind(image, normal, config), noisy)
    return noisy


def _gaussian(image, normal, config):
    noise = config.noise_sigma * normal
    return jnp.clip(image + noise, 0, 1)


def _poisson(image, normal, config):
    """Poisson counts of mean v x over v, for grey values x in 0..255.

    v is the number of grey levels in the image, up to the next power of two: 256 for a slice with
    more than 128, whose noise is then one grey level at most. Drawn from the normal distribution
    of that mean and variance, whose quantiles differ from the counts' by less than 2 / v grey
    levels: `jax.random.poisson` takes twenty times as long.
    """
    levels = jnp.zeros(256, bool).at[jnp.round(255 * image).astype(jnp.int32)].set(True).sum()
    scale = 1 << (32 - jax.lax.clz(levels - 1))
    return jnp.clip(image + jnp.sqrt(image / (255 * scale)) * normal, 0, 1)


def _salt_and_pepper(image, normal, config):
    bound = NormalDist().inv_cdf(1 - config.salt_pepper_fraction / 2)
    return jnp.where(normal > bound, 1, jnp.where(normal < -bound, 0, image))
