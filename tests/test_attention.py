"""Attention with decomposed relative positions: folded = definition, windows, padding, oracle.

Tolerances are relative L2 errors, about three times what was measured on CPU.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.models import attention
from pgpsam_jax.models.attention import folded, naive
from pgpsam_jax.models.image_encoder import Attention, EncoderConfig
from pgpsam_jax.models.lora import LoraConfig

# (batch, heads, head dim, grid): 14x14 windows of a 26-token side, vit_t windows, 512 px, oblong.
CASES = {
    "window14": (8, 3, 64, (14, 14)),
    "window8": (9, 4, 32, (8, 8)),
    "global32": (1, 2, 64, (32, 32)),
    "wide": (2, 3, 16, (5, 9)),
    "tall": (2, 3, 16, (9, 4)),
}
VALUE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 4e-6
BFLOAT16_TOLERANCE = 1.5e-2


def relative(got, expected) -> float:
    """Relative L2 error in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def operands(case: str):
    """q, k, v and both tables of a case, and its grid; scores spread over several units."""
    batch, heads, dim, (h, w) = CASES[case]
    rng = np.random.default_rng(sorted(CASES).index(case))
    q, k, v = rng.standard_normal((3, batch, heads, h * w, dim)).astype(np.float32)
    rel_h, rel_w = (0.3 * rng.standard_normal((2 * n - 1, dim)).astype(np.float32) for n in (h, w))
    return tuple(map(jnp.asarray, (1.5 * q, k, v, rel_h, rel_w))), (h, w)


def literal(q, k, v, rel_h, rel_w, grid):
    """The definition in numpy float64, one query at a time."""
    q, k, v, rel_h, rel_w = (np.asarray(x, np.float64) for x in (q, k, v, rel_h, rel_w))
    (h, w), out = grid, np.zeros_like(v)
    places = list(itertools.product(range(h), range(w)))
    for b, n in np.ndindex(*q.shape[:2]):
        for i, (row, column) in enumerate(places):
            x = q[b, n, i]
            score = k[b, n] @ x / np.sqrt(len(x))
            score += [x @ rel_h[row - r + h - 1] + x @ rel_w[column - c + w - 1] for r, c in places]
            weight = np.exp(score - score.max())
            out[b, n, i] = weight @ v[b, n] / weight.sum()
    return out


@pytest.mark.parametrize("case", CASES)
def test_folded_equals_naive(case):
    """Values, and gradients of a random linear function of them to q, k, v and both tables."""
    args, grid = operands(case)
    probe = jax.random.normal(jax.random.key(1), args[2].shape)

    @jax.jit
    def both(args):
        runs = [jax.vjp(lambda *a, f=f: f(*a, grid), *args) for f in (folded, naive)]
        return [(out, *pullback(probe)) for out, pullback in runs]

    errors = [relative(*pair) for pair in zip(*both(args), strict=True)]
    assert errors[0] <= VALUE_TOLERANCE
    assert max(errors[1:]) <= GRADIENT_TOLERANCE, errors


@pytest.mark.parametrize("case", ["wide", "tall"])
@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_backends_equal_the_literal_definition(case, backend):
    args, grid = operands(case)
    run = jax.jit(attention.BACKENDS[backend], static_argnums=5)
    assert relative(run(*args, grid), literal(*args, grid)) <= VALUE_TOLERANCE


@pytest.mark.parametrize("case", ["window14", "window8", "global32"])
def test_bfloat16_folded_is_no_worse_than_naive(case):
    args, grid = operands(case)
    half = [x.astype(jnp.bfloat16) for x in args]

    @jax.jit
    def run(args):
        exact = naive(*(x.astype(jnp.float32) for x in args), grid)
        return exact, folded(*args, grid), naive(*args, grid)

    exact, *halves = run(half)
    assert all(x.dtype == jnp.bfloat16 for x in halves)
    errors = [relative(x, exact) for x in halves]
    assert errors[0] <= min(BFLOAT16_TOLERANCE, 1.1 * errors[1]), errors


def test_softmax_is_float32_for_bfloat16_operands():
    """Equal keys give equal weights: 1/T for every T only when the sum is not bfloat16."""
    tokens = 1000
    q, k = jnp.ones((1, 1, 1, 4), jnp.bfloat16), jnp.ones((1, 1, tokens, 4), jnp.bfloat16)
    v = jnp.ones((1, 1, tokens, 4), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(attention.attend(q, k, v), np.float32), 1.0)


def test_attend_survives_scores_beyond_exp():
    """Scores of +-400 overflow exp unless the maximum is subtracted."""
    q = jnp.full((1, 1, 2, 1), 20.0)
    k, v = jnp.array([[[[20.0], [-20.0], [19.0]]]]), jnp.array([[[[1.0], [5.0], [9.0]]]])
    np.testing.assert_allclose(attention.attend(q, k, v), 1.0, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(1, 3))
def test_relative_positions_against_loops(size, channels):
    table = np.random.default_rng(size).standard_normal((2 * size - 1, channels))
    got = attention.relative_positions(table, size)
    for h, k, c in itertools.product(range(size), range(size), range(channels)):
        assert got[h, k, c] == table[h - k + size - 1, c]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_windows_split_and_join(batch, rows, columns, size):
    """Join undoes split, and window (b, i, j) holds the tokens a slice takes."""
    grid = (rows * size, columns * size)
    x = np.arange(batch * grid[0] * grid[1] * 2).reshape(batch, *grid, 2)
    windows = attention.split_windows(x, size)
    np.testing.assert_array_equal(attention.join_windows(windows, grid), x)
    for n, (b, i, j) in enumerate(itertools.product(range(batch), range(rows), range(columns))):
        expected = x[b, i * size : (i + 1) * size, j * size : (j + 1) * size]
        np.testing.assert_array_equal(windows[n], expected)


apply = nnx.jit(lambda module, x: module(x))


def build(grid, window: int, lora, dtype=jnp.float32, backend="folded") -> Attention:
    """An encoder attention, every parameter random, LoRA's B included."""
    config = EncoderConfig(
        grid, 16, width=24, depth=1, heads=3, global_blocks=(), attention=backend
    )
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Attention(config, window, lora, dtype=dtype, rngs=nnx.Rngs(0)))
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
        heads = literal(q[None], k[None], v[None], *rel, (size_h, size_w))[0]
        out[place] = heads.transpose(1, 0, 2).reshape(size_h, size_w, d)
    return out[:, :h, :w] @ p["proj/kernel"] + p["proj/bias"]


def module_state(module):
    return nnx.to_flat_state(nnx.state(module))


@pytest.mark.parametrize("lora", [None, LoraConfig(2)], ids=["base", "lora"])
@pytest.mark.parametrize(
    ("grid", "window"),
    [((6, 6), 0), ((3, 7), 0), ((8, 8), 4), ((6, 6), 4), ((5, 7), 4), ((3, 2), 4), ((9, 4), 4)],
)
def test_attention_equals_its_transcription(grid, window, lora):
    """Global and windowed, the grid divisible or not, oblong, and smaller than one window."""
    module = build(grid, window, lora)
    x = jax.random.normal(jax.random.key(2), (2, *grid, 24))
    assert relative(apply(module, x), transcribed(module, x, window)) <= VALUE_TOLERANCE


@pytest.mark.parametrize("lora", [None, LoraConfig(2)], ids=["base", "lora"])
def test_window_padding_is_projection_of_zeros(lora):
    """Padding the projection with zeros before the bias equals projecting a padded input."""
    inside, padded = build((6, 5), 4, lora), build((8, 8), 4, lora)
    nnx.update(padded, nnx.state(inside))
    x = jax.random.normal(jax.random.key(3), (2, 6, 5, 24))
    zeros = jnp.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)))
    assert relative(apply(inside, x), apply(padded, zeros)[:, :6, :5]) <= VALUE_TOLERANCE


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_bfloat16_module(backend):
    """Compute type in and out; parameters stay float32; error of the order of bfloat16's."""
    args = ((6, 5), 4, LoraConfig(2))
    half, full = build(*args, jnp.bfloat16, backend), build(*args, jnp.float32, backend)
    x = jax.random.normal(jax.random.key(4), (2, 6, 5, 24))
    out = apply(half, x)
    assert out.dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(half)))
    assert relative(out, apply(full, x)) <= 2e-2
