"""A method that compiles in a second, for tests of what happens around a model.

python tiny_method.py FLAGS: `pgpsam_jax.main`, with the method known to it.
"""

from unittest import mock

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from pgpsam_jax.methods import registry
from pgpsam_jax.models.initializers import kernel_init
from pgpsam_jax.models.segmenter import Segmenter
from pgpsam_jax.sharding import rules

NAME = "tiny"


class _Encoder(nnx.Module):
    """Patches of 4 x 4 pixels, frozen or trained as the configuration says."""

    def __init__(self, config, rngs):
        self.config = config  # of the backbone that it stands for
        self.patches = nnx.Conv(3, 16, (4, 4), strides=4, kernel_init=kernel_init, rngs=rngs)


class Tiny(Segmenter):
    """Images (B, S, S, 3) to logits (B, S / 4, S / 4, K), twice."""

    label = NAME

    def __init__(self, sam, num_classes, *, lora=None, dtype=None, rngs):
        self.image_encoder = _Encoder(sam.encoder, rngs)
        self.first, self.second = (
            nnx.Linear(16, num_classes, kernel_init=kernel_init, rngs=rngs) for _ in range(2)
        )

    def encode(self, images):
        return jax.nn.relu(self.image_encoder.patches(images))

    def segment(self, features, keys=None):
        return {"bootstrap": self.first(features), "final": self.second(features)}


# Weights that train and weights that do not are both stored in parts, as those of a real method.
SPREAD = (
    (r"patches/kernel$", PartitionSpec(None, None, None, rules.PARTS)),
    (r"(first|second)/kernel$", rules.INPUTS),
)


def known(method=Tiny, key=(NAME, "")):
    """Registers the method, as `config.model.name` "tiny", inside the block."""
    return mock.patch.dict(registry.METHODS, {key: method})


def spread():
    """Have `sharding` spread the weights inside the block, which else are whole everywhere."""
    return mock.patch.dict(rules.METHOD_RULES, {(NAME, ""): SPREAD})


if __name__ == "__main__":
    from pgpsam_jax.main import main

    with known():
        main()
