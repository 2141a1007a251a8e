"""PGP-SAM of a few thousand parameters, on drawn outputs of an image encoder or with its own."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgpsam_jax.models.pgpsam.model import PgpSam, PgpSamConfig
from pgpsam_jax.models.sam.sam import SamConfig
from tests.reference import equations_numpy as eq

ENCODER = dict(width=32, depth=2, heads=2, global_blocks=(0, 1), out_channels=32, window_size=4)
TABLE_3 = {
    "baseline": dict(cfm=False, ppg=False, ppr=False),
    "cfm": dict(cfm=True, ppg=False, ppr=False),
    "cfm+ppg": dict(cfm=True, ppg=True, ppr=False),
    "cfm+ppg+ppr": dict(cfm=True, ppg=True, ppr=True),
}


def small(size=32, classes=3, **kwargs):
    """A model of a few thousand parameters: what a test of behavior, not of size, needs."""
    sam = SamConfig.preset("vit_t", size, 8, **ENCODER)
    decoder = dataclasses.replace(sam.decoder, depth=1, heads=2, mlp_dim=64)
    return PgpSamConfig(dataclasses.replace(sam, decoder=decoder), classes, **kwargs)


class Given(nnx.Module):
    """In the place of the image encoder: the `images` are its outputs already."""

    def __call__(self, images, taps):
        return images


def create(config, encoder=False, dtype=jnp.float32, *, kind=PgpSam, rngs):
    """A model at its own initialization, with its image encoder or `Given`."""
    model = kind(config, dtype=dtype, rngs=rngs)
    if not encoder:
        model.image_encoder = Given()
    return model


@functools.cache
def build(config, encoder=False, dtype=jnp.float32, kind=PgpSam):
    """A model with every parameter random, and its arrays in float64."""
    return eq.random_module(functools.partial(create, config, encoder, dtype, kind=kind), 1)


def inputs_for(config, encoder=False, batch=2):
    """Images, or the neck's output and the taps."""
    rng, sam = np.random.default_rng(5), config.sam
    if encoder:
        return rng.random((batch, *sam.image_size, 3), np.float32)
    shape = (batch, *sam.encoder.grid)
    taps = [rng.normal(size=(*shape, sam.encoder.width)) for _ in config.stage_taps]
    neck = rng.normal(size=(*shape, sam.encoder.out_channels))
    return np.float32(neck), [np.float32(tap) for tap in taps]
