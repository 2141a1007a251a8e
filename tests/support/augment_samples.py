"""Batches, keys and warps that the tests of augmentation share."""

from functools import partial

import jax
import numpy as np

from pgpsam_jax.data.augmentation.augment import AugmentConfig, augment, sample_keys
from pgpsam_jax.data.augmentation.warp import warp_coordinates

SIZE = 48
NOTHING = {"rotate_probability": 0, "scale_probability": 0, "elastic_probability": 0}
ALL = AugmentConfig(
    rotate_probability=1, scale_probability=1, elastic_probability=1, exclusive=False
)
run = jax.jit(augment, static_argnums=3)
fast_keys = jax.jit(sample_keys)


def only(kind, **fields):
    return AugmentConfig(**NOTHING | {f"{kind}_probability": 1.0} | fields)


def keys(count, step=0, seed=0):
    return fast_keys(jax.random.key(seed), step, np.arange(count))


def batch(count=8, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.random((count, size, size), dtype=np.float32)
    return images, rng.integers(0, 9, images.shape).astype(np.int32)


def pixel_grid(shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def coordinates(count, config, shape=(SIZE, SIZE), seed=0):
    return np.asarray(warp_many(keys(count, seed=seed), shape, config))


@partial(jax.jit, static_argnums=(1, 2))
def warp_many(sample_keys, shape, config):
    return jax.vmap(lambda key: warp_coordinates(key, shape, config)[0])(sample_keys)
