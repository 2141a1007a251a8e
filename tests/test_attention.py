"""Attention with decomposed relative positions: backends = definition, windows, padding, oracle.

Tolerances are relative L2 errors, about three times what was measured on CPU.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from places import gpu

from pgpsam_jax import sharding
from pgpsam_jax.errors import UserError
from pgpsam_jax.models import attention, placement
from pgpsam_jax.models.image_encoder import (
    Attention,
    EncoderConfig,
)
from pgpsam_jax.models.initial import NoDraws
from pgpsam_jax.models.lora import LoraConfig
from pgpsam_jax.models.placement import Placement

# (batch, heads, head dim, grid, window or None for the grid): 14x14 windows of a 26-token side,
# those that overhang at 512 px, vit_t windows, 512 px, 1024 px, oblong.
CASES = {
    "window14": (8, 3, 64, (14, 14), None),
    "overhangs right": (2, 3, 64, (14, 4), (14, 14)),
    "overhangs below": (2, 3, 64, (4, 14), (14, 14)),
    "corner": (2, 3, 64, (4, 4), (14, 14)),
    "window8": (9, 4, 32, (8, 8), None),
    "global32": (1, 2, 64, (32, 32), None),
    "wide": (2, 3, 16, (5, 9), None),
    "tall": (2, 3, 16, (9, 4), None),
    "overhangs by most": (2, 3, 16, (2, 1), (5, 4)),
}
LARGE = {"global64": (1, 1, 16, (64, 64), None), "wide blocks": (2, 2, 16, (8, 32), None)}
VALUE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 4e-6
PADDING_TOLERANCE = 1.5e-5  # of gradients where a window overhangs: sums of few, small terms
BFLOAT16_TOLERANCE = 1.5e-2


def relative(got, expected) -> float:
    """Relative L2 error in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def operands(case: str):
    """q, k, v, both tables and the padding's key and value of a case, and its grid."""
    batch, heads, dim, grid, window = (CASES | LARGE)[case]
    rng = np.random.default_rng(sorted(CASES | LARGE).index(case))
    shape = (batch, heads, grid[0] * grid[1], dim)
    q, k, v = rng.standard_normal((3, *shape)).astype(np.float32)
    tables = (0.3 * rng.standard_normal((2 * n - 1, dim)) for n in window or grid)
    padding = rng.standard_normal((2, heads, dim))
    return tuple(jnp.asarray(x, jnp.float32) for x in (1.5 * q, k, v, *tables, padding)), grid


def run_of(backend, grid):
    """f(q, k, v, rel_h, rel_w[, padding]) by a backend's name, or a kernel for folded operands."""
    if callable(backend):
        return lambda *args: backend(*attention.fold(*args[:5], grid, *args[5:]))
    return lambda *args: attention.attention(backend, *args[:5], grid, *args[5:])


def literal(q, k, v, rel_h, rel_w, padding, *, grid):
    """The definition in numpy float64, one query at a time, padding cells one by one."""
    q, k, v, rel_h, rel_w, padding = (
        np.asarray(x, np.float64) for x in (q, k, v, rel_h, rel_w, padding)
    )
    h, w = ((len(table) + 1) // 2 for table in (rel_h, rel_w))
    places, out = list(np.ndindex(*grid)), np.zeros_like(v)
    for b, n in np.ndindex(*q.shape[:2]):
        at = {place: (k[b, n, i], v[b, n, i]) for i, place in enumerate(places)}
        cells = [at.get(cell, padding[:, n]) for cell in np.ndindex(h, w)]
        keys, values = (np.array(x) for x in zip(*cells, strict=True))
        for i, (row, column) in enumerate(places):
            x = q[b, n, i]
            score = keys @ x / np.sqrt(len(x)) + [
                x @ rel_h[row - r + h - 1] + x @ rel_w[column - c + w - 1]
                for r, c in np.ndindex(h, w)
            ]
            weight = np.exp(score - score.max())
            out[b, n, i] = weight @ values / weight.sum()
    return out


def errors_of(case, backends, dtype=jnp.float32):
    """Per backend, the worst of 6 or 7 errors against naive: of values, and of gradients to q, k,
    v, both tables and the padding, all of a random linear function of the values.
    """
    args, grid = operands(case)
    args = args if (CASES | LARGE)[case][4] else args[:5]
    args = tuple(x.astype(dtype) for x in args)
    probe = jax.random.normal(jax.random.key(1), args[2].shape, dtype)

    @jax.jit
    def run(args):
        runs = [jax.vjp(run_of(backend, grid), *args) for backend in ("naive", *backends)]
        return [(out, *pullback(probe)) for out, pullback in runs]

    wanted, *rest = run(args)
    errors = [[relative(*pair) for pair in zip(got, wanted, strict=True)] for got in rest]
    return [(value, max(gradients)) for value, *gradients in errors]


# JAX's own implementation in place of the kernel: layout, padded head dim and scale.
CUDNN_WAY = functools.partial(attention.cudnn, implementation="xla")


@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_backends_equal_naive(case):
    """Splash, interpreted here, where the keys fill its blocks."""
    _, _, _, (h, w), window = (CASES | LARGE)[case]
    splash = ["splash"] if h * w % attention.LANES == 0 else []
    for value, gradient in errors_of(case, ["folded", "lean", CUDNN_WAY, *splash]):
        assert value <= VALUE_TOLERANCE
        assert gradient <= (PADDING_TOLERANCE if window else GRADIENT_TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_chunks_of_queries_change_nothing(case, monkeypatch):
    """Where all scores would be more than a bound, on the share of a device."""
    args, _ = operands(case)
    assert attention._chunks(*args[:2]) == 1
    batch, heads, tokens, _ = args[0].shape
    monkeypatch.setattr(attention, "CHUNK", 2 * batch * heads * tokens**2)  # half of all scores
    assert attention._chunks(*args[:2]) > 1
    ((value, gradient),) = errors_of(case, ["lean"])
    assert value <= VALUE_TOLERANCE
    assert gradient <= (PADDING_TOLERANCE if CASES[case][4] else GRADIENT_TOLERANCE)


def test_how_many_chunks():
    def chunks(b, n, t, dtype="float32"):
        return attention._chunks(*[jax.ShapeDtypeStruct((b, n, t, 64), dtype)] * 2)

    assert [chunks(1, 12, 1024), chunks(12, 12, 1024), chunks(1, 12, 4096)] == [1, 4, 4]
    assert chunks(1, 16, 4096, "bfloat16") == 4  # scores are float32 there, too
    mesh = jax.make_mesh((8,), ("data",))
    with placement.traced_for(Placement("cpu", mesh=mesh, batch_axes=("data",))):
        # Twelve rows do not divide over eight devices: each has all of them.
        assert [chunks(8, 12, 4096), chunks(12, 12, 4096)] == [4, 64]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_cudnn_equals_naive_on_a_gpu(case):
    device = gpu()
    if attention.choose("auto", 1, 192, jnp.bfloat16, Placement.of(device)) != "cudnn":
        pytest.skip(f"{device.device_kind} is too old for this head dim")
    with jax.default_device(device), placement.traced_for(Placement.of(device)):
        errors = errors_of(case, ["cudnn"], jnp.bfloat16)
    assert max(errors[0]) <= 3 * BFLOAT16_TOLERANCE, errors


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_fused_kernels_on_a_mesh_equal_one_device(kernel, sizes):
    """Batch over data and fsdp, heads over tensor; 4 heads do not divide over 8: only the batch."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8, 4, 128, 24)).astype(np.float32)
    v = rng.standard_normal((8, 4, 128, 16)).astype(np.float32)
    mesh = sharding.make_mesh(*sizes)
    run = attention.splash if kernel == "splash" else attention.cudnn
    if kernel == "cudnn":
        run = functools.partial(run, implementation="xla")

    def value_and_gradients(q, k, v):
        out, pullback = jax.vjp(run, q, k, v)
        return out, *pullback(jnp.cos(out))

    alone = jax.jit(value_and_gradients)(q, k, v)
    share = sharding.batch_sharding(mesh)
    split = jax.jit(
        sharding.over_mesh(value_and_gradients, mesh), in_shardings=share, out_shardings=share
    ).lower(q, k, v)
    assert "manual_computation" in split.as_text()
    for got, wanted in zip(split.compile()(q, k, v), alone, strict=True):
        assert relative(got, wanted) <= VALUE_TOLERANCE


@pytest.mark.parametrize("case", ["wide", "tall", "overhangs by most", "corner"])
@pytest.mark.parametrize("backend", ["naive", "folded"])
def test_backends_equal_the_literal_definition(case, backend):
    args, grid = operands(case)
    assert (
        relative(jax.jit(run_of(backend, grid))(*args), literal(*args, grid=grid))
        <= VALUE_TOLERANCE
    )


@pytest.mark.parametrize("far", [-300.0, 300.0])
def test_padding_far_from_the_rest_survives(far):
    """Position terms that overflow exp: the padding takes all of the weight, or none."""
    (q, k, v, rel_h, rel_w, padding), grid = operands("overhangs by most")
    q = jnp.abs(q) + 1
    rel_w = rel_w.at[: len(rel_w) // 2 - 1].set(far)  # keys of columns outside, from the first on
    rel_h = rel_h.at[: len(rel_h) // 2].set(far)
    args = (q, k, v, rel_h, rel_w, padding)
    run = run_of("folded", grid)
    got, gradients = jax.jit(
        lambda *a: (run(*a), jax.grad(lambda *a: run(*a).sum(), range(6))(*a))
    )(*args)
    assert all(np.isfinite(g).all() for g in gradients)
    assert relative(got, literal(*args, grid=grid)) <= 1e-5
    if far > 0:
        np.testing.assert_allclose(got, np.broadcast_to(padding[1][:, None], got.shape), rtol=1e-5)


@pytest.mark.parametrize("case", ["window14", "window8", "global32", "overhangs right", "corner"])
def test_bfloat16_folded_is_no_worse_than_naive(case):
    """Nor, where a window overhangs, worse than that of a whole one: all padding in one score."""
    args, grid = operands(case)
    half = [x.astype(jnp.bfloat16) for x in args]

    @jax.jit
    def run(args):
        exact = run_of("naive", grid)(*(x.astype(jnp.float32) for x in args))
        return exact, run_of("folded", grid)(*args), run_of("naive", grid)(*args)

    exact, *halves = run(half)
    assert all(x.dtype == jnp.bfloat16 for x in halves)
    errors = [relative(x, exact) for x in halves]
    overhangs = CASES[case][4] is not None
    assert errors[0] <= (6e-3 if overhangs else min(BFLOAT16_TOLERANCE, 1.1 * errors[1])), errors


AMPERE, HOPPER, TURING = (Placement("gpu", capability) for capability in (8.0, 9.0, 7.5))
CPU, TPU = Placement("cpu"), Placement("tpu")


@pytest.mark.parametrize(
    ("here", "tokens", "depth", "dtype", "backend"),
    [
        (CPU, 1024, 128, "float32", "lean"),
        (CPU, 1024, 128, "bfloat16", "lean"),
        (AMPERE, 1024, 128, "bfloat16", "cudnn"),  # vit_b at 512 px
        (AMPERE, 196, 92, "float16", "cudnn"),  # its windows
        (AMPERE, 4096, 192, "bfloat16", "lean"),  # at 1024 px
        (HOPPER, 4096, 192, "bfloat16", "cudnn"),
        (HOPPER, 9216, 272, "bfloat16", "lean"),
        (HOPPER, 1024, 128, "float32", "lean"),
        (TURING, 1024, 128, "bfloat16", "lean"),
        (TPU, 1024, 128, "bfloat16", "splash"),
        (TPU, 196, 92, "bfloat16", "lean"),
        (TPU, 1024, 128, "float32", "lean"),
    ],
)
def test_auto_chooses(here, tokens, depth, dtype, backend):
    assert attention.choose("auto", tokens, depth, dtype, here) == backend


@pytest.mark.parametrize(
    ("name", "here", "dtype", "depth", "message"),
    [
        ("cudnn", CPU, "bfloat16", 128, "needs an NVIDIA GPU .* here are cpu"),
        ("cudnn", HOPPER, "float32", 128, "compute_dtype bfloat16 .* float32 and 128 channels"),
        ("cudnn", AMPERE, "bfloat16", 192, "at most 128 channels .* 192 channels; choose auto"),
        ("splash", HOPPER, "bfloat16", 128, "needs a TPU"),
    ],
)
def test_backends_that_cannot_run(name, here, dtype, depth, message):
    with pytest.raises(UserError, match=f"^model.attention .*{message}"):
        attention.choose(name, 1024, depth, dtype, here)


def test_splash_leaves_windows_to_lean():
    assert attention.choose("splash", 196, 92, "bfloat16", TPU) == "lean"


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
    windows = attention.split_windows(x, (size, size))
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
        nnx.eval_shape(lambda: Attention(config, window, lora, dtype=dtype, rngs=NoDraws()))
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


@pytest.mark.parametrize("backend", ["naive", "folded"])
def test_bfloat16_module(backend):
    """Compute type in and out; parameters stay float32; error of the order of bfloat16's."""
    args = ((6, 5), 4, LoraConfig(2))
    half, full = build(*args, jnp.bfloat16, backend), build(*args, jnp.float32, backend)
    x = jax.random.normal(jax.random.key(4), (2, 6, 5, 24))
    out = apply(half, x)
    assert out.dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(half)))
    assert relative(out, apply(full, x)) <= 2e-2
