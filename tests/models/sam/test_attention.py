"""Attention with decomposed relative positions: backends = definition, windows, padding, oracle.

Tolerances are relative L2 errors, about three times what was measured on CPU.
"""

import contextlib
import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.sam import attention, relative_position
from pgpsam_jax.models.sam import attention_kernels as kernels
from pgpsam_jax.sharding import context, device_mesh
from pgpsam_jax.sharding.context import TracingContext
from tests.reference.attention_numpy import literal, relative
from tests.support.places import gpu

# (batch, heads, head dim, grid, window or None for the grid): 14x14 windows of a 26-token side,
# those that overhang at 512 px, vit_t windows, three blocks of splash, oblong; 512 px, 1024 px.
CASES = {
    "window14": (8, 3, 64, (14, 14), None),
    "overhangs right": (2, 3, 64, (14, 4), (14, 14)),
    "overhangs below": (2, 3, 64, (4, 14), (14, 14)),
    "corner": (2, 3, 64, (4, 4), (14, 14)),
    "window8": (9, 4, 32, (8, 8), None),
    "blocks": (2, 2, 16, (8, 48), None),
    "wide": (2, 3, 16, (5, 9), None),
    "tall": (2, 3, 16, (9, 4), None),
    "overhangs by most": (2, 3, 16, (2, 1), (5, 4)),
}
LARGE = {"global32": (1, 2, 64, (32, 32), None), "global64": (1, 1, 16, (64, 64), None)}
VALUE_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 4e-6
PADDING_TOLERANCE = 1.5e-5  # of gradients where a window overhangs: sums of few, small terms
BFLOAT16_TOLERANCE = 1.5e-2


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
        return lambda *args: backend(*relative_position.fold(*args[:5], grid, *args[5:]))
    return lambda *args: attention.attention(backend, *args[:5], grid, *args[5:])


@contextlib.contextmanager
def chunks_of(operands):
    """`lean` as where all scores would be more than a bound, here twice what is allowed."""
    assert kernels._chunks(*operands[:2]) == 1
    batch, heads, tokens, _ = operands[0].shape
    with mock.patch.object(kernels, "CHUNK", 2 * batch * heads * tokens**2):
        assert kernels._chunks(*operands[:2]) > 1
        yield "lean"


def results_of(case, backends, dtype=jnp.float32):
    """Per backend, after naive, 6 or 7 arrays: values, and gradients to q, k, v, both tables and
    the padding, all of a random linear function of the values. "chunked" is lean in chunks.
    """
    args, grid = operands(case)
    args = args if (CASES | LARGE)[case][4] else args[:5]
    args = tuple(x.astype(dtype) for x in args)
    probe = np.random.default_rng(1).standard_normal(args[2].shape).astype(dtype)

    def differentiated(backend, args, probe):
        chunked = chunks_of(args) if backend == "chunked" else contextlib.nullcontext(backend)
        with chunked as backend:
            out, pullback = jax.vjp(run_of(backend, grid), *args)
            return out, *pullback(probe)

    @jax.jit
    def run(args, probe):
        return [differentiated(backend, args, probe) for backend in ("naive", *backends)]

    return run(args, probe)


def errors_of(results):
    """(error of the values, the worst of gradients) against the first, of each of the others."""
    wanted, *rest = results
    errors = [[relative(*pair) for pair in zip(got, wanted, strict=True)] for got in rest]
    return [(value, max(gradients)) for value, *gradients in errors]


# JAX's own implementation in place of the kernel: layout, padded head dim and scale.
CUDNN_WAY = functools.partial(kernels.cudnn, implementation="xla")


def on_whole_blocks(case):
    return math.prod((CASES | LARGE)[case][3]) % kernels.LANES == 0


EVERY = ["folded", "lean", "chunked", CUDNN_WAY]
QUICK = {
    "wide": EVERY,
    "corner": EVERY,
    "blocks": ["lean", "splash"],
}


def compare(case, backends):
    """Of backends with naive; values of small cases with loops, too."""
    args, grid = operands(case)
    window = (CASES | LARGE)[case][4]
    results = results_of(case, backends)
    for value, gradient in errors_of(results):
        assert value <= VALUE_TOLERANCE
        assert gradient <= (PADDING_TOLERANCE if window else GRADIENT_TOLERANCE)
    if case in ("wide", "tall", "overhangs by most", "corner"):
        by_loops = literal(*args, grid=grid)
        assert all(relative(values, by_loops) <= VALUE_TOLERANCE for values, *_ in results)


@pytest.mark.parametrize("case", QUICK)
def test_backends_equal_naive(case):
    """Splash, interpreted here, where the keys fill its blocks."""
    compare(case, QUICK[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_every_backend_equals_naive(case):
    compare(case, EVERY + ["splash"] * on_whole_blocks(case))


def test_how_many_chunks():
    def chunks(b, n, t, dtype="float32"):
        return kernels._chunks(*[jax.ShapeDtypeStruct((b, n, t, 64), dtype)] * 2)

    assert [chunks(1, 12, 1024), chunks(12, 12, 1024), chunks(1, 12, 4096)] == [1, 4, 4]
    assert chunks(1, 16, 4096, "bfloat16") == 4  # scores are float32 there, too
    mesh = jax.make_mesh((8,), ("data",))
    with context.traced_for(TracingContext("cpu", mesh=mesh, batch_axes=("data",))):
        # Twelve rows do not divide over eight devices: each has all of them.
        assert [chunks(8, 12, 4096), chunks(12, 12, 4096)] == [4, 64]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_cudnn_equals_naive_on_a_gpu(case):
    device = gpu()
    if attention.choose("auto", 1, 192, jnp.bfloat16, TracingContext.of(device)) != "cudnn":
        pytest.skip(f"{device.device_kind} is too old for this head dim")
    with jax.default_device(device), context.traced_for(TracingContext.of(device)):
        errors = errors_of(results_of(case, ["cudnn"], jnp.bfloat16))
    assert max(errors[0]) <= 3 * BFLOAT16_TOLERANCE, errors


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(run, q, k, v):
    out, pullback = jax.vjp(run, q, k, v)
    return out, *pullback(jnp.cos(out))


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        ("cudnn", (8, 1, 1)),
        ("cudnn", (2, 2, 2)),
        ("cudnn", (1, 1, 8)),
        ("splash", (2, 2, 2)),
        pytest.param("splash", (8, 1, 1), marks=pytest.mark.slow),  # slow to compile; what puts
        pytest.param("splash", (1, 1, 8), marks=pytest.mark.slow),  # them on a mesh is the same
    ],
    ids=str,
)
def test_fused_kernels_on_a_mesh_equal_one_device(kernel, sizes):
    """Batch over data and fsdp, heads over tensor; 4 heads do not divide over 8: only the batch."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 8, 4, 128, 24)).astype(np.float32)
    v = rng.standard_normal((8, 4, 128, 16)).astype(np.float32)
    mesh = device_mesh.make_mesh(*sizes)
    run = {"splash": kernels.splash, "cudnn": CUDNN_WAY}[kernel]
    alone = value_and_gradients(kernels.attend, q, k, v)
    both = functools.partial(value_and_gradients, run)
    share = device_mesh.batch_sharding(mesh)
    split = jax.jit(
        device_mesh.traced_on(mesh)(both), in_shardings=share, out_shardings=share
    ).lower(q, k, v)
    assert "manual_computation" in split.as_text()
    for got, wanted in zip(split.compile()(q, k, v), alone, strict=True):
        assert relative(got, wanted) <= VALUE_TOLERANCE


@functools.partial(jax.jit, static_argnums=0)
def folded_and_slopes(grid, *args):
    run = run_of("folded", grid)
    return run(*args), jax.grad(lambda *args: run(*args).sum(), range(6))(*args)


@pytest.mark.parametrize("far", [-300.0, 300.0])
def test_padding_far_from_the_rest_survives(far):
    """Position terms that overflow exp: the padding takes all of the weight, or none."""
    args, grid = operands("overhangs by most")
    q, k, v, rel_h, rel_w, padding = map(np.array, args)
    q = np.abs(q) + 1
    rel_w[: len(rel_w) // 2 - 1] = far  # keys of columns outside, from the first on
    rel_h[: len(rel_h) // 2] = far
    args = (q, k, v, rel_h, rel_w, padding)
    got, gradients = folded_and_slopes(grid, *args)
    assert all(np.isfinite(g).all() for g in gradients)
    assert relative(got, literal(*args, grid=grid)) <= 1e-5
    if far > 0:
        np.testing.assert_allclose(got, np.broadcast_to(padding[1][:, None], got.shape), rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "window14",
        "corner",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("window8", "global32", "overhangs right")
        ),
    ],
)
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
    overhangs = (CASES | LARGE)[case][4] is not None
    assert errors[0] <= (6e-3 if overhangs else min(BFLOAT16_TOLERANCE, 1.1 * errors[1])), errors


AMPERE, HOPPER, TURING = (TracingContext("gpu", capability) for capability in (8.0, 9.0, 7.5))
CPU, TPU = TracingContext("cpu"), TracingContext("tpu")


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
    np.testing.assert_array_equal(np.asarray(kernels.attend(q, k, v), np.float32), 1.0)


def test_attend_survives_scores_beyond_exp():
    """Scores of +-400 overflow exp unless the maximum is subtracted."""
    q = jnp.full((1, 1, 2, 1), 20.0)
    k, v = jnp.array([[[[20.0], [-20.0], [19.0]]]]), jnp.array([[[[1.0], [5.0], [9.0]]]])
    np.testing.assert_allclose(kernels.attend(q, k, v), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 3), (7, 2)])
def test_relative_positions_against_loops(size, channels):
    table = np.random.default_rng(size).standard_normal((2 * size - 1, channels))
    got = np.asarray(relative_position.relative_positions(table, size))
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
