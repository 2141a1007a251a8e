"""SAM's decomposed relative positions: their terms of the attention scores.

Letters: B batch (windows folded in), N heads, H W token grid of the queries, T = H * W tokens, C
channels per head. The score of query (h, w) and key (k, l) is
q.k / sqrt(C) + q.R_h[h - k] + q.R_w[w - l], with q unscaled in the position terms. Tables of
2n - 1 rows belong to a window of n; where the token grid is smaller, the window overhangs the
image, and the cells outside it are padding that all have the same key and value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pgpsam_jax.models.layers import wide


def window_of(rel_h, rel_w) -> tuple[int, int]:
    """Returns rows and columns of the window that two tables belong to."""
    return (len(rel_h) + 1) // 2, (len(rel_w) + 1) // 2


def relative_positions(table, size: int):
    """(2*size - 1, C) table to (size, size, C): entry [h, k] is the row of offset h - k."""
    offsets = jnp.arange(size)[:, None] - jnp.arange(size)[None, :] + size - 1
    return table[offsets]


def position_scores(q, rel_h, rel_w, grid: tuple[int, int]):
    """Returns both position terms of each query, (B, N, T, rows) and (B, N, T, columns)."""
    h, w = grid
    b, n, t, c = q.shape
    by_row, by_column = (
        relative_positions(table, whole)[:size].swapaxes(1, 2)
        for table, whole, size in zip((rel_h, rel_w), window_of(rel_h, rel_w), grid, strict=True)
    )
    q = q.reshape(b, n, h, w, c)
    # Batched over h and over w, spelled out: twice as fast on CPU as the einsum. B and N stay two
    # axes: they may be on different devices.
    product = functools.partial(jax.lax.dot_general, dimension_numbers=(((4,), (1,)), ((0,), (0,))))
    score_h = jnp.moveaxis(product(jnp.moveaxis(q, 2, 0), by_row), 0, 2)
    score_w = jnp.moveaxis(product(jnp.moveaxis(q, 3, 0), by_column), 0, 3)
    return score_h.reshape(b, n, t, -1), score_w.reshape(b, n, t, -1)


def padding_scores(score_h, score_w, grid: tuple[int, int]):
    """log of the sum, over a window's cells outside the grid, of exp(both terms): (B, N, T, 1).

    Those cells are two rectangles, over each of which the sum is a product: nothing is subtracted.
    """
    (h, w), dtype = grid, score_h.dtype
    score_h, score_w = (x.astype(wide(dtype)) for x in (score_h, score_w))
    total = functools.partial(jax.nn.logsumexp, axis=-1, keepdims=True)
    rectangles = []
    if w < score_w.shape[-1]:
        rectangles.append(total(score_h[..., :h]) + total(score_w[..., w:]))
    if h < score_h.shape[-1]:
        rectangles.append(total(score_h[..., h:]) + total(score_w))
    return functools.reduce(jnp.logaddexp, rectangles).astype(dtype)


def with_padding(k, v, padding):
    """Keys and values (B, N, T, C) and, as token T, those (N, C) of the padding cells."""
    return tuple(
        jnp.concatenate([x, jnp.broadcast_to(one[:, None], (*x.shape[:2], 1, x.shape[3]))], 2)
        for x, one in zip((k, v), padding, strict=True)
    )


def fold(q, k, v, rel_h, rel_w, grid: tuple[int, int], padding=None):
    """(q', k', v') whose plain attention, scale 1, is the one with positions: no bias tensor.

    The bias has rank H + W, so it fits into the head dimension: q' = [q / sqrt(C), q.R_h, q.R_w],
    k' = [k, onehot(row), onehot(column)]. All padding cells together are one more key: a column of
    q' holds what their positions add up to, and only that key has a one there.
    """
    h, w = grid
    score_h, score_w = position_scores(q, rel_h, rel_w, grid)
    parts = [q * q.shape[-1] ** -0.5, score_h[..., :h], score_w[..., :w]]
    places = np.concatenate([np.repeat(np.eye(h), w, 0), np.tile(np.eye(w), (h, 1))], -1)
    if (h, w) != (score_h.shape[-1], score_w.shape[-1]):
        parts.append(padding_scores(score_h, score_w, grid))
        k, v = with_padding(k, v, padding)
        places = np.pad(places, (0, 1))
        places[-1, -1] = 1
    one_hot = jnp.broadcast_to(jnp.asarray(places, k.dtype), (*k.shape[:2], *places.shape))
    return jnp.concatenate(parts, -1), jnp.concatenate([k, one_hot], -1), v
