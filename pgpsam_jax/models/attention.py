"""Self-attention with SAM's decomposed relative positions: the one place with attention kernels.

Letters: B batch (windows folded in), N heads, H W query grid, T = H*W tokens, C head dim.
score(query (h, w), key (k, l)) = q.k / sqrt(C) + q.R_h[h - k] + q.R_w[w - l]   (unscaled q in the
position terms). Operands are head-major, (B, N, T, C): the layout CPU and GPU matmuls want.
"""

import jax
import jax.numpy as jnp

from pgpsam_jax.models.layers import wide, wide_einsum


def relative_positions(table, size: int):
    """(2*size - 1, C) table to (size, size, C): entry [h, k] is the row of offset h - k."""
    offsets = jnp.arange(size)[:, None] - jnp.arange(size)[None, :] + size - 1
    return table[offsets]


def position_scores(q, rel_h, rel_w, grid: tuple[int, int]):
    """Both position terms of every query: (B, N, T, H) and (B, N, T, W)."""
    h, w = grid
    b, n, t, c = q.shape
    q = q.reshape(b * n, h, w, c)
    # Batched matmuls over h and over w, spelled out: twice as fast on CPU as the einsum.
    by_row = q.swapaxes(0, 1).reshape(h, -1, c) @ relative_positions(rel_h, h).swapaxes(1, 2)
    by_column = jnp.moveaxis(q, 2, 0).reshape(w, -1, c) @ relative_positions(rel_w, w).swapaxes(
        1, 2
    )
    score_h = by_row.reshape(h, b * n, w, h).swapaxes(0, 1)
    score_w = jnp.moveaxis(by_column.reshape(w, b * n, h, w), 0, 2)
    return score_h.reshape(b, n, t, h), score_w.reshape(b, n, t, w)


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


def naive(q, k, v, rel_h, rel_w, grid):
    """The definition, with the position bias written out: the oracle of the other backends."""
    b, n, t, c = q.shape
    score_h, score_w = position_scores(q, rel_h, rel_w, grid)
    bias = score_h.reshape(b, n, t, grid[0], 1) + score_w.reshape(b, n, t, 1, grid[1])
    scores = jnp.einsum("bnqc,bnkc->bnqk", q, k) * c**-0.5 + bias.reshape(b, n, t, t)
    weights = jax.nn.softmax(scores.astype(wide(scores.dtype)), axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkc->bnqc", weights, v)


def folded(q, k, v, rel_h, rel_w, grid):
    """Exact without a bias tensor: the bias has rank H + W, so it folds into the head dimension.

    q' = [q / sqrt(C), q.R_h, q.R_w], k' = [k, onehot(row), onehot(column)].
    """
    h, w = grid
    score_h, score_w = position_scores(q, rel_h, rel_w, grid)
    q = jnp.concatenate([q * q.shape[-1] ** -0.5, score_h, score_w], axis=-1)
    rows = jnp.repeat(jnp.eye(h, dtype=k.dtype), w, axis=0)
    columns = jnp.tile(jnp.eye(w, dtype=k.dtype), (h, 1))
    place = jnp.concatenate([rows, columns], axis=-1)
    k = jnp.concatenate([k, jnp.broadcast_to(place, (*k.shape[:2], *place.shape))], axis=-1)
    return attend(q, k, v)


BACKENDS = {"naive": naive, "folded": folded}


def split_windows(x, size: int):
    """(B, H, W, D), H and W multiples of `size`, to (B * windows, size, size, D), B major."""
    b, h, w, d = x.shape
    x = x.reshape(b, h // size, size, w // size, size, d).swapaxes(2, 3)
    return x.reshape(-1, size, size, d)


def join_windows(x, grid: tuple[int, int]):
    """Inverse of `split_windows`: (B * windows, size, size, D) to (B, H, W, D)."""
    h, w = grid
    size, d = x.shape[1], x.shape[-1]
    x = x.reshape(-1, h // size, w // size, size, size, d).swapaxes(2, 3)
    return x.reshape(-1, h, w, d)
