"""Attention kernels: `naive` and `lean` take relative positions, the others folded operands.

Letters: B batch (windows folded in), N heads, H W token grid of the queries, T = H * W tokens, C
channels per head. Operands are head-major, (B, N, T, C). See `relative_position` for the scores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pgpsam_jax.models.layers import wide, wide_einsum
from pgpsam_jax.models.sam.relative_position import (
    padding_scores,
    position_scores,
    window_of,
    with_padding,
)
from pgpsam_jax.sharding import context

LANES = 128  # of a TPU: its kernel takes keys in blocks of a multiple of it
# Bytes of scores that `lean` computes at a time on a device: those of one image of ViT-b are 48 MiB
# at 512 px and 768 MiB at 1024 px, and a backward pass holds three such arrays.
CHUNK = 2**28


def naive(q, k, v, rel_h, rel_w, padding=None, *, grid):
    """The definition, with bias and padding cells written out: the oracle of the other backends."""
    rows, columns = window_of(rel_h, rel_w)
    if grid != (rows, columns):

        def whole(x, filling):
            window = jnp.broadcast_to(filling, (*x.shape[:2], rows, columns, x.shape[-1]))
            inside = x.reshape(*x.shape[:2], *grid, -1)
            return window.at[:, :, : grid[0], : grid[1]].set(inside).reshape(*x.shape[:2], -1, c)

        c = q.shape[-1]
        key, value = (x[:, None, None] for x in padding)
        whole_window = whole(q, jnp.zeros((), q.dtype)), whole(k, key), whole(v, value)
        out = naive(*whole_window, rel_h, rel_w, grid=(rows, columns))
        out = out.reshape(*q.shape[:2], rows, columns, c)[:, :, : grid[0], : grid[1]]
        return out.reshape(v.shape)
    b, n, t, c = q.shape
    score_h, score_w = position_scores(q, rel_h, rel_w, grid)
    bias = score_h.reshape(b, n, t, rows, 1) + score_w.reshape(b, n, t, 1, columns)
    scores = jnp.einsum("bnqc,bnkc->bnqk", q, k) * c**-0.5 + bias.reshape(b, n, t, t)
    weights = jax.nn.softmax(scores.astype(wide(scores.dtype)), axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkc->bnqc", weights, v)


def lean(q, k, v, rel_h, rel_w, padding=None, *, grid):
    """No T x T array is kept for the backward pass, which computes the scores once more.

    Queries are taken in chunks where all their scores would be more than `CHUNK`. The bias is
    added, not folded: fewer products, and adding is cheap where scores are in cache.
    """
    (h, w), score_padding = grid, None
    score_h, score_w = position_scores(q, rel_h, rel_w, grid)
    if grid != window_of(rel_h, rel_w):
        score_padding = padding_scores(score_h, score_w, grid)
        k, v = with_padding(k, v, padding)
    q = q * q.shape[-1] ** -0.5
    return _lean(q, k, v, score_h[..., :h], score_w[..., :w], score_padding)


def _scores(q, k, score_h, score_w, score_padding):
    bias = (score_h[..., :, None] + score_w[..., None, :]).reshape(*score_h.shape[:-1], -1)
    if score_padding is not None:
        bias = jnp.concatenate([bias, score_padding], -1)
    return wide_einsum("bnqc,bnkc->bnqk", q, k) + bias


@jax.custom_vjp
def _lean(q, k, v, score_h, score_w, score_padding):
    return _lean_forward(q, k, v, score_h, score_w, score_padding)[0]


def _lean_forward(q, k, v, *positions):
    def run(_, part):
        q, positions = part
        scores = _scores(q, k, *positions)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bnqk,bnkc->bnqc", weights.astype(v.dtype), v)
        return None, ((out / total).astype(v.dtype), highest + jnp.log(total))

    _, (out, log_total) = _in_chunks(run, None, (q, positions), _chunks(q, k))
    return out, (q, k, v, positions, out, log_total)


def _lean_backward(kept, slope):
    q, k, v, positions, out, log_total = kept

    def run(sums, part):
        q, positions, out, log_total, slope = part
        weights = jnp.exp(_scores(q, k, *positions) - log_total)
        mean = jnp.sum(slope.astype(weights.dtype) * out, -1, keepdims=True)
        scores = weights * (wide_einsum("bnqc,bnkc->bnqk", slope, v) - mean)
        h, w = (x.shape[-1] for x in positions[:2])
        cells = scores[..., : h * w].reshape(*scores.shape[:-1], h, w)
        by_padding = None if positions[2] is None else scores[..., h * w :].astype(q.dtype)
        by_position = cells.sum(-1).astype(q.dtype), cells.sum(-2).astype(q.dtype), by_padding
        by_v = _over_queries(slope, weights.astype(v.dtype))
        scores = scores.astype(q.dtype)
        by_q = jnp.einsum("bnqk,bnkc->bnqc", scores, k)
        found = _over_queries(q, scores), by_v
        found = found if sums is None else jax.tree.map(jnp.add, sums, found)
        return found, (by_q, by_position)

    count = _chunks(q, k)
    sums = None if count == 1 else tuple(jnp.zeros(x.shape, wide(x.dtype)) for x in (k, v))
    parts = q, positions, out, log_total, slope
    (by_k, by_v), (by_q, by_position) = _in_chunks(run, sums, parts, count)
    return by_q, by_k.astype(k.dtype), by_v.astype(v.dtype), *by_position


def _chunks(q, k) -> int:
    """Returns the number of equal parts of the queries whose scores stay within `CHUNK`."""
    here, (b, n, t, _) = context.current(), q.shape
    size = b * n * t * k.shape[2] * wide(q.dtype).itemsize
    for axes, length in ((here.batch_axes, b), (here.head_axes, n)):
        shares = here.shares(axes)
        size //= shares if length % shares == 0 else 1
    return next(i for i in range(1, t + 1) if t % i == 0 and (size <= i * CHUNK or i == t))


def _in_chunks(run, carry, parts, count: int):
    """`jax.lax.scan` of run over leaves (B, N, T, ...) of `parts`, in `count` equal parts of T."""
    if count == 1:
        return run(carry, parts)

    def split(x):
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, -1, *x.shape[3:]), 2, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    carry, found = jax.lax.scan(run, carry, jax.tree.map(split, parts))
    return carry, jax.tree.map(join, found)


_lean.defvjp(_lean_forward, _lean_backward)


def _over_queries(x, weights):
    """Sum over queries q of x (B, N, q, C) by weights (B, N, q, k): (B, N, k, C).

    XLA's CPU backend multiplies with the transpose of a large square array at a third of the
    speed. Hence the small operand is transposed, and the barrier keeps that from being undone.
    """
    out = jnp.einsum("bnqc,bnqk->bnck", x, weights)
    return jax.lax.optimization_barrier(out).swapaxes(2, 3)


def attend(q, k, v, gate=None):
    """softmax(q k^T) v over (B, N, T, C) operands, q already scaled; softmax in float32.

    gate: factors of the weights after the softmax, which then no longer sum to one. The division
    comes after the product with v, on T*C instead of T*T numbers.
    """
    scores = wide_einsum("bnqc,bnkc->bnqk", q, k)
    scores -= jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores)
    total = weights.sum(-1, keepdims=True)
    weights = weights if gate is None else weights * gate
    out = jnp.einsum("bnqk,bnkc->bnqc", weights.astype(v.dtype), v)
    return (out / total).astype(v.dtype)


def cudnn(q, k, v, implementation="cudnn"):
    """cuDNN's fused attention, float16 and bfloat16: one head dim for all, a multiple of 8."""
    depth, c = -(-q.shape[-1] // 8) * 8, v.shape[-1]

    def kernel(*operands):
        padded = (
            jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, depth - x.shape[-1]))).swapaxes(1, 2)
            for x in operands
        )
        out = jax.nn.dot_product_attention(*padded, scale=1.0, implementation=implementation)
        return out.swapaxes(1, 2)[..., :c]

    return context.per_device(kernel, q, k, v)


def splash(q, k, v):
    """The TPU's fused attention, which keeps no T x T array; interpreted, slowly, elsewhere."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as tpu
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, interpret = q.shape[2], context.current().platform != "tpu"
    block = next(size for size in (512, 256, LANES) if tokens % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = tpu.BlockSizes(**blocks)

    def kernel(q, k, v):
        mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * q.shape[1])
        run = tpu.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        return _at_default_precision(jax.vmap(run))(q, k, v)

    return context.per_device(kernel, q, k, v)


def _at_default_precision(run):
    """Runs products of 16-bit operands at JAX's default precision, which the TPU's kernels require.

    Both passes are traced so, whatever `jax_default_matmul_precision` says.
    """
    precision = functools.partial(jax.default_matmul_precision, "default")

    def forward(*operands):
        with precision():
            return jax.vjp(run, *operands)

    def backward(pullback, gradient):
        with precision():
            return pullback(gradient)

    whole = jax.custom_vjp(lambda *operands: forward(*operands)[0])
    whole.defvjp(forward, backward)
    return whole
