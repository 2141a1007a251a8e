"""Resize-and-pad between native slices (H, W) and the square network input (S, S), both ways.

The longer side fills S, the shorter one is centered and padded; pixels keep their aspect ratio.
Coordinates are continuous with pixel centers at half integers, at every resolution. Letters: N
slices, B batch, H W native size, S input side, h w size of the logits, K classes.

Functions that need JAX import it themselves; the others serve worker processes without it.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Letterbox:
    """Position of a native slice in the (size, size) input: rows top..top+height, same for W."""

    height: int
    width: int
    top: int
    left: int
    size: int

    @classmethod
    def of(cls, shape_hw: tuple[int, int], size: int) -> "Letterbox":
        """Fits a native (H, W) slice into (size, size)."""
        longer = max(shape_hw)
        height, width = (max(1, (2 * n * size + longer) // (2 * longer)) for n in shape_hw)
        return cls(height, width, (size - height) // 2, (size - width) // 2, size)

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the input that the slice fills."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def to_model(images: np.ndarray, letterbox: Letterbox, order: int) -> np.ndarray:
    """Resizes native slices (N, H, W) to (N, S, S), padded with 0.

    Args:
        images: (N, H, W).
        letterbox: of (H, W).
        order: 1 for intensities: bilinear, with antialiasing when shrinking, returns float32. 0 for
            label ids: nearest pixel, returns the same dtype.
    """
    dtype = images.dtype if order == 0 else np.float32
    count, *native = images.shape
    out = np.zeros((count, letterbox.size, letterbox.size), dtype)
    inside = out[:, *letterbox.inside]
    if tuple(native) == (letterbox.height, letterbox.width):
        inside[...] = images
    elif order == 0:
        rows, columns = (_nearest(n, m) for n, m in zip(native, inside.shape[1:], strict=True))
        inside[...] = images[:, rows[:, None], columns]
    else:
        rows = _resample(images.astype(np.float32, copy=False), 1, letterbox.height)
        inside[...] = _resample(rows, 2, letterbox.width)
    return out


def to_model_on_device(images, letterbox: Letterbox):
    """`to_model` of order 1 in JAX, equal up to rounding: (B, H, W) float32 -> (B, S, S)."""
    import jax.numpy as jnp

    sides = images.shape[1:], (letterbox.height, letterbox.width)
    rows, columns = (_linear(n, m) for n, m in zip(*sides, strict=True))
    inside = _product(images[..., None], rows, columns)[..., 0]
    margins = [(0, 0)]
    for start, length in ((letterbox.top, letterbox.height), (letterbox.left, letterbox.width)):
        margins.append((start, letterbox.size - start - length))
    return jnp.pad(inside, margins)


def logits_to_native(logits, letterbox: Letterbox, shape_hw: tuple[int, int]):
    """Resamples logits (B, h, w, K) of the input, at any resolution, to (B, H, W, K) float32.

    Bilinear at the native pixel centers, without reading logits of the padding. `letterbox` and
    `shape_hw` are static: the weights are constants of the compiled program.
    """
    _, h, w, _ = logits.shape
    rows = _bilinear(letterbox.top, letterbox.height, letterbox.size, h, shape_hw[0])
    columns = _bilinear(letterbox.left, letterbox.width, letterbox.size, w, shape_hw[1])
    return _product(logits.astype("float32"), rows, columns)


def _product(images, rows: np.ndarray, columns: np.ndarray):
    """Applies weights (H, h) and (W, w) to (B, h, w, K)."""
    import jax

    exact = jax.lax.Precision.HIGHEST  # TPUs and TF32 would round the interpolation weights
    if not _is_identity(rows):
        images = jax.numpy.einsum("Hh,bhwk->bHwk", rows, images, precision=exact)
    if not _is_identity(columns):
        images = jax.numpy.einsum("Ww,bhwk->bhWk", columns, images, precision=exact)
    return images


def _nearest(source: int, target: int) -> np.ndarray:
    """Source index of each target pixel's center, in exact integer arithmetic."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


def _resample(images: np.ndarray, axis: int, target: int) -> np.ndarray:
    """Linear along one axis, as a few weighted gathers."""
    taps, weights = _taps(images.shape[axis], target)
    shape = [-1 if a == axis else 1 for a in range(images.ndim)]
    total: np.ndarray = np.zeros((), np.float32)
    for tap, weight in zip(taps.T, weights.T, strict=True):
        total = total + np.take(images, tap, axis) * weight.reshape(shape)
    return total


def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Source indices and float32 weights (target, taps) of a linear resampling."""
    step = source / target
    reach = max(step, 1)
    centers = ((np.arange(target) + 0.5) * step - 0.5)[:, None]
    taps = np.ceil(centers - reach).astype(int) + np.arange(int(2 * reach) + 1)
    weights = np.maximum(0, 1 - np.abs(taps - centers) / reach) * (taps >= 0) * (taps < source)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return taps.clip(0, source - 1), weights


def _linear(source: int, target: int) -> np.ndarray:
    """(target, source) weights of the same resampling."""
    taps, weights = _taps(source, target)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target)[:, None], taps), weights)
    return matrix


def _bilinear(start: int, length: int, size: int, source: int, target: int) -> np.ndarray:
    """(target, source) weights that sample `target` pixels from start..start+length of `size`."""
    ratio = source / size
    first = int(np.ceil(start * ratio - 1e-9))
    last = max(int(np.floor((start + length) * ratio + 1e-9)) - 1, first)
    position = (start + (np.arange(target) + 0.5) * length / target) * ratio - 0.5
    position = np.clip(position, first, min(last, source - 1))
    below = np.floor(position).astype(int)
    weights = np.zeros((target, source + 1), np.float32)
    weights[np.arange(target), below] = 1 - (position - below)
    weights[np.arange(target), below + 1] += position - below
    return weights[:, :source]


def _is_identity(weights: np.ndarray) -> bool:
    return weights.shape[0] == weights.shape[1] and np.array_equal(weights, np.eye(len(weights)))
