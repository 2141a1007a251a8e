"""From masks to SAM's prompts, on the device: a point deep inside, and a bounding box.

Letters: M masks, H W pixels. Coordinates are pixel indices (x, y), as SAM's prompt encoder takes
them. The point and box of an empty mask are meaningless.
"""

import jax
import jax.numpy as jnp


def squared_distances(masks):
    """Returns squared distances to the nearest pixel outside, (M, H, W) bool to float32; exact.

    Pixels beyond the border count as neither, so that in a mask of all pixels all are equally far.
    """
    _, h, w = masks.shape
    rows = jnp.arange(h, dtype=jnp.float32)[:, None]
    far = float(h + w)  # further than any pixel of the array
    above = rows - jax.lax.cummax(jnp.where(masks, -far, rows), axis=1)
    below = jax.lax.cummin(jnp.where(masks, 2 * far, rows), axis=1, reverse=True) - rows
    vertical = jnp.square(jnp.minimum(jnp.minimum(above, below), far))
    columns = jnp.arange(w, dtype=jnp.float32)
    horizontal = jnp.square(columns[:, None] - columns)
    # All are whole numbers below 2^24. The reduction is fused: (M, H, W, W) is not stored.
    return jnp.min(vertical[:, :, None, :] + horizontal, axis=-1)


def inner_points(masks):
    """Returns the pixel furthest from all outside, the first if several: (M, H, W) to (M, 2)."""
    m, _, w = masks.shape
    index = jnp.argmax(squared_distances(masks).reshape(m, -1), axis=-1)
    return jnp.stack([index % w, index // w], axis=-1).astype(jnp.float32)


def bounding_boxes(masks, *, erosion: int = 0, growth: int = 0):
    """Returns xyxy (M, 4), first and last column and row, of masks (M, H, W) eroded by a square.

    erosion: pixels taken off on every side, so that thin parts do not count; a mask that has none
    but thin parts keeps them. growth: pixels by which the box is widened on every side, as a
    dilation of the mask would, up to the border.
    """
    _, h, w = masks.shape
    if erosion:
        kept = eroded(masks, erosion)
        masks = jnp.where(jnp.any(kept, axis=(1, 2), keepdims=True), kept, masks)
    sides = []
    for axis, size in ((1, w), (2, h)):
        taken, index = jnp.any(masks, axis=axis), jnp.arange(size)
        first = jnp.min(jnp.where(taken, index, size), axis=-1) - growth
        last = jnp.max(jnp.where(taken, index, -1), axis=-1) + growth
        sides.append((jnp.maximum(first, 0), jnp.minimum(last, size - 1)))
    (left, right), (top, bottom) = sides
    return jnp.stack([left, top, right, bottom], axis=-1).astype(jnp.float32)


def eroded(masks, radius: int):
    """Erodes masks by a square of side 2 radius + 1; outside of the image counts as inside."""
    outside = ~masks
    for axis in (1, 2):  # a square is a row of columns
        window = [1, 1, 1]
        window[axis] = 2 * radius + 1
        outside = jax.lax.reduce_window(outside, False, jnp.logical_or, window, (1, 1, 1), "SAME")
    return ~outside
