"""A method that compiles in a second, for tests of what happens around a model.

python tiny_method.py FLAGS: `pgpsam_jax.main`, with the method known to it.
"""

import contextlib

import jax
from flax import nnx

from pgpsam_jax import build
from pgpsam_jax.models.sam import SamConfig

NAME = "tiny"


class _Encoder(nnx.Module):
    """Patches of 4 x 4 pixels, frozen or trained as the configuration says."""

    def __init__(self, config, rngs):
        self.config = config  # of the backbone that it stands for
        self.patches = nnx.Conv(3, 16, (4, 4), strides=4, rngs=rngs)


class Tiny(nnx.Module):
    """Images (B, S, S, 3) to logits (B, S / 4, S / 4, K), twice."""

    def __init__(self, config, num_classes, rngs):
        self.image_encoder = _Encoder(config, rngs)
        self.first = nnx.Linear(16, num_classes, rngs=rngs)
        self.second = nnx.Linear(16, num_classes, rngs=rngs)

    def __call__(self, images):
        features = jax.nn.relu(self.image_encoder.patches(images))
        return {"bootstrap": self.first(features), "final": self.second(features)}


def _make(settings, num_classes, dtype, rngs):
    sam = SamConfig.preset(settings.encoder, settings.image_size, settings.patch_size)
    return Tiny(sam.encoder, num_classes, rngs)


@contextlib.contextmanager
def known():
    """Have the method, as `config.model.name` "tiny", inside the block."""
    build.METHODS[NAME, "paper"] = build.Method(_make, {}, ())
    try:
        yield
    finally:
        del build.METHODS[NAME, "paper"]


if __name__ == "__main__":
    from pgpsam_jax.main import run

    with known():
        run()
