"""LoRA on the fused qkv projection: starts as the base model, equals weights with its update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.sam.lora import LoraConfig, LoraQKV
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from tests.reference import sam_torch
from tests.reference.sam_torch import SMALL, draw, encode, relative

# Of two encoder blocks, one windowed.
LITTLE = SamConfig(
    SMALL.image_size,
    dataclasses.replace(SMALL.encoder, depth=2, global_blocks=(1,)),
    dataclasses.replace(SMALL.decoder, depth=1),
)


@functools.cache
def base():
    """Official weights and our model with them."""
    official = sam_torch.random_official(LITTLE)
    return official, sam_torch.jax_sam(LITTLE, official)


def with_lora(config: LoraConfig, *, zero: bool):
    """The little SAM with random A, and B zero or random."""
    sam = sam_torch.jax_sam(LITTLE, base()[0], lora=config)
    for i, block in enumerate(sam.image_encoder.blocks):
        block.attn.lora.a.set_value(0.3 * draw(*block.attn.lora.a.shape, seed=i))
        if not zero:
            block.attn.lora.b.set_value(0.3 * draw(*block.attn.lora.b.shape, seed=100 + i))
    return sam


def test_lora_starts_at_nothing():
    """B starts at zero, A within 1/sqrt(D)."""
    lora = LoraQKV(48, LoraConfig(3), dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert lora.a.shape == (2, 48, 3) and lora.b.shape == (2, 3, 48)
    assert not lora.b[...].any() and 0.9 < float(abs(lora.a[...]).max()) * 48**0.5 <= 1
    assert not lora(draw(4, 48)).any()


@pytest.mark.slow
def test_lora_starts_as_the_base_model():
    """B = 0 gives the base model's output bit for bit."""
    images = draw(1, 96, 96, 3)
    adapted = encode(with_lora(LoraConfig(3), zero=True), images)
    np.testing.assert_array_equal(adapted, encode(base()[1], images))


@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v"), ("v", "k"), ("k",)])
def test_a_product_goes_to_its_target(targets):
    """Whatever the order of the targets, the output is that of queries, keys and values."""
    lora = LoraQKV(6, LoraConfig(2, targets), dtype=jnp.float32, rngs=nnx.Rngs(0))
    lora.b.set_value(draw(*lora.b.shape))
    x, found = draw(4, 6), dict.fromkeys("qkv", np.zeros((4, 6), np.float32))
    for target, a, b in zip(targets, np.array(lora.a[...]), np.array(lora.b[...]), strict=True):
        found[target] = x @ a @ b
    wanted = np.stack([found[target] for target in "qkv"], axis=-2)
    np.testing.assert_allclose(lora(x), wanted, atol=1e-5)


@pytest.mark.parametrize("targets", [("q", "v"), pytest.param(("v", "k"), marks=pytest.mark.slow)])
def test_lora_adds_its_product_to_the_projection(targets):
    """The same as a base model whose qkv weights hold the update in the rows of the targets."""
    sam, merged = with_lora(LoraConfig(3, targets), zero=False), dict(base()[0])
    for i, block in enumerate(sam.image_encoder.blocks):
        name = f"image_encoder.blocks.{i}.attn.qkv.weight"
        update = np.einsum("tdr,tre->ted", block.attn.lora.a[...], block.attn.lora.b[...])
        parts = dict(zip("qkv", np.split(merged[name].copy(), 3), strict=True))
        for target, value in zip(targets, update, strict=True):
            parts[target] += value
        merged[name] = np.concatenate(list(parts.values()))
    images = draw(1, 96, 96, 3)
    adapted = encode(sam, images)
    assert relative(adapted, encode(sam_torch.jax_sam(LITTLE, merged), images)) <= 1e-5
    assert relative(adapted, encode(base()[1], images)) > 0.1


def test_no_lora_without_rank_or_targets():
    for config in (LoraConfig(0), LoraConfig(4, ()), None):
        sam = nnx.eval_shape(lambda c=config: Sam(SMALL, lora=c, rngs=ShapeOnlyRngs()))
        assert not jax.tree.leaves(nnx.state(sam, nnx.LoRAParam))
