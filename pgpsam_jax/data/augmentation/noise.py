"""Intensity noise of the authors' release for slices in [0, 1], at most one kind per sample."""

from statistics import NormalDist

import jax
import jax.numpy as jnp

from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.data.augmentation.sampling import one_of


def add_noise(key, image, config: AugmentConfig):
    """Adds one kind of noise, or none, to an (H, W) floating-point image in [0, 1]."""
    choice_key, value_key = jax.random.split(key)
    # At most one kind is applied, so all three can share the same random numbers.
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
    """Poisson noise: counts with mean v x, divided by v, for gray values x in 0..255.

    v is the number of gray levels in the image, rounded up to a power of two (256 for more than 128
    levels: noise of at most one gray level). Sampled from the normal distribution of the same mean
    and variance, whose quantiles differ by less than 2 / v gray levels; `jax.random.poisson` takes
    twenty times as long.
    """
    levels = jnp.zeros(256, bool).at[jnp.round(255 * image).astype(jnp.int32)].set(True).sum()
    scale = 1 << (32 - jax.lax.clz(levels - 1))
    return jnp.clip(image + jnp.sqrt(image / (255 * scale)) * normal, 0, 1)


def _salt_and_pepper(image, normal, config):
    bound = NormalDist().inv_cdf(1 - config.salt_pepper_fraction / 2)
    return jnp.where(normal > bound, 1, jnp.where(normal < -bound, 0, image))
