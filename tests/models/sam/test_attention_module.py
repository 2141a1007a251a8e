"""The encoder's attention module against SAM's order of work, with windows, padding and LoRA.

Tolerances are relative L2 errors, about three times what was measured on CPU.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.models.initializers import ShapeOnlyRngs
from pgpsam_jax.models.sam.image_encoder import Attention, EncoderConfig
from pgpsam_jax.models.sam.lora import LoraConfig
from tests.reference.attention_numpy import literal, relative

VALUE_TOLERANCE = 2e-6

apply = nnx.jit(lambda module, x: module(x))


def normal(seed: int, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(grid, window: int, lora, dtype=jnp.float32, backend="folded") -> Attention:
    """An encoder attention, every parameter random, LoRA's B included."""
    config = EncoderConfig(
        grid, 16, width=24, depth=1, heads=3, global_blocks=(), attention=backend
    )
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Attention(config, window, lora, dtype=dtype, rngs=ShapeOnlyRngs()))
    )
    rng = np.random.default_rng(1)
    leaves, tree = jax.tree.flatten(state)
    leaves = [jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype) for p in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def transcribed(module: Attention, x, window: int):
    """SAM's order of work in numpy float64: zero-pad, split, project with bias, attend, join."""
    p = {"/".join(map(str, k)): np.asarray(v[...], np.float64) for k, v in module_state(module)}
    x = np.asarray(x, np.float64)
    b, h, w, d = x.shape
    size_h, size_w = (window, window) if window else (h, w)
    x = np.pad(x, ((0, 0), (0, -h % size_h), (0, -w % size_w), (0, 0)))
    out = np.zeros_like(x)
    nothing = np.zeros((2, module.heads, 0))  # windows are whole here
    weight = p["qkv/kernel"].copy()
    if "lora/a" in p:  # the update of q and v as columns of the projection
        weight[:, :d] += p["lora/a"][0] @ p["lora/b"][0]
        weight[:, 2 * d :] += p["lora/a"][1] @ p["lora/b"][1]
    for n, top, left in itertools.product(
        range(b), range(0, x.shape[1], size_h), range(0, x.shape[2], size_w)
    ):
        place = (n, slice(top, top + size_h), slice(left, left + size_w))
        tokens = x[place].reshape(-1, d) @ weight + p["qkv/bias"]
        q, k, v = tokens.reshape(-1, 3, module.heads, d // module.heads).transpose(1, 2, 0, 3)
        rel = p["rel_pos_h"], p["rel_pos_w"]
        heads = literal(q[None], k[None], v[None], *rel, nothing, grid=(size_h, size_w))[0]
        out[place] = heads.transpose(1, 0, 2).reshape(size_h, size_w, d)
    return out[:, :h, :w] @ p["proj/kernel"] + p["proj/bias"]


def module_state(module):
    return nnx.to_flat_state(nnx.state(module))


GRIDS = [((3, 7), 0), ((8, 8), 4), ((5, 7), 4), ((3, 2), 4), ((9, 4), 4)]
SLOW = [(grid, window, None) for grid, window in GRIDS if grid != (5, 7)]
SLOW += [((6, 6), window, lora) for window in (0, 4) for lora in (None, LoraConfig(2))]


@pytest.mark.parametrize(
    ("grid", "window", "lora"),
    [
        *((*sizes, LoraConfig(2)) for sizes in GRIDS),
        ((5, 7), 4, None),
        *(pytest.param(*arguments, marks=pytest.mark.slow) for arguments in SLOW),
    ],
    ids=str,
)
def test_attention_equals_its_transcription(grid, window, lora):
    """Global and windowed, the grid divisible or not, oblong, and smaller than one window."""
    module = build(grid, window, lora)
    x = normal(2, (2, *grid, 24))
    assert relative(apply(module, x), transcribed(module, x, window)) <= VALUE_TOLERANCE


@pytest.mark.parametrize(
    "lora", [pytest.param(None, marks=pytest.mark.slow), LoraConfig(2)], ids=["base", "lora"]
)
def test_window_padding_is_projection_of_zeros(lora):
    """Padding the projection with zeros before the bias equals projecting a padded input."""
    inside, padded = build((6, 5), 4, lora), build((8, 8), 4, lora)
    nnx.update(padded, nnx.state(inside))
    x = normal(3, (2, 6, 5, 24))
    zeros = np.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)))
    assert relative(apply(inside, x), apply(padded, zeros)[:, :6, :5]) <= VALUE_TOLERANCE


@pytest.mark.parametrize("backend", ["naive", "folded"])
def test_bfloat16_module(backend):
    """Compute type in and out; parameters stay float32; error of the order of bfloat16's."""
    args = ((6, 5), 4, LoraConfig(2))
    half, full = build(*args, jnp.bfloat16, backend), build(*args)
    x = normal(4, (2, 6, 5, 24))
    out = apply(half, x)
    assert out.dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(half)))
    assert relative(out, apply(full, x)) <= 2e-2
