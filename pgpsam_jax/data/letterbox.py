"""Between native slices (H, W) and the square network input (S, S): one map, both directions.

The longer side fills S, the shorter is centred and padded; pixels keep their aspect. Coordinates
are continuous with pixel centres at half integers, on every grid and at every resolution.
Letters: N slices, B batch, H W native grid, S input side, h w logit grid, K classes.

The functions for the device import JAX themselves: the others serve processes without it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_SAMPLE = 1 << 21  # voxels; as many give a percentile to three digits


@dataclass(frozen=True)
class Fit:
    """Where a native slice lies in the (size, size) input: rows top..top+height, same for W."""

    height: int
    width: int
    top: int
    left: int
    size: int

    @classmethod
    def of(cls, shape_hw: tuple[int, int], size: int) -> "Fit":
        """Fit a native (H, W) slice into (size, size)."""
        longer = max(shape_hw)
        height, width = (max(1, (2 * n * size + longer) // (2 * longer)) for n in shape_hw)
        return cls(height, width, (size - height) // 2, (size - width) // 2, size)


def to_model(images: np.ndarray, fit: Fit, order: int) -> np.ndarray:
    """Native slices (N, H, W) -> (N, S, S), padded with 0.

    `order` 1 is for intensities: bilinear, with a triangle as wide as the step when shrinking, so
    that nothing aliases; float32 out. `order` 0 is for label ids: nearest pixel, same dtype out.
    """
    dtype = images.dtype if order == 0 else np.float32
    count, *native = images.shape
    out = np.zeros((count, fit.size, fit.size), dtype)
    inside = out[:, fit.top : fit.top + fit.height, fit.left : fit.left + fit.width]
    if tuple(native) == (fit.height, fit.width):
        inside[...] = images
    elif order == 0:
        rows, columns = (_nearest(n, m) for n, m in zip(native, inside.shape[1:], strict=True))
        inside[...] = images[:, rows[:, None], columns]
    else:
        rows = _resample(images.astype(np.float32, copy=False), 1, fit.height)
        inside[...] = _resample(rows, 2, fit.width)
    return out


class Percentiles(NamedTuple):
    """A window for intensities without a unit, as in MR: percent of a volume's own voxels."""

    low: float
    high: float


Window = tuple[float, float] | Percentiles


def ends_of(window: Window, volume: np.ndarray) -> tuple[float, float]:
    """The intensities of a volume (D, H, W) that map to 0 and 1, from a regular sample of it."""
    if not isinstance(window, Percentiles):
        return window
    sample = volume.reshape(-1)[:: -(-volume.size // _SAMPLE)]
    low, high = map(float, np.percentile(sample, window))
    return (low, high) if low < high else (low, low + 1)


def rescale(images: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Intensities to [0, 1] float32: the window's ends map to 0 and 1, the rest is clipped."""
    low, high = window
    out = np.clip(images, low, high)
    place = out if out.dtype.kind == "f" else None
    out = np.divide(np.subtract(out, low, out=place), high - low, out=place)
    return out.astype(np.float32, copy=False)


def quantise(images: np.ndarray, levels: int) -> np.ndarray:
    """Intensities in [0, 1] rounded down to `levels` equal steps; 0 leaves them continuous.

    256 is what the release stores: 8-bit pictures, truncated. It takes a volume's own extremes
    for the ends of the window, which is the same wherever a CT reaches beyond both.
    """
    if not levels:
        return images
    return np.floor(images * (levels - 1)) / np.float32(levels - 1)


def model_slices(
    images: np.ndarray, window: tuple[float, float], fit: Fit, levels: int
) -> np.ndarray:
    """Native slices (N, H, W) as the network sees them, (N, S, S) float32.

    Clipped before the resize: metal at 3000 HU must not bleed through it. `levels` as in
    `quantise`.
    """
    return to_model(windowed(images, window, levels), fit, order=1)


def windowed(images: np.ndarray, window: tuple[float, float], levels: int) -> np.ndarray:
    """Native slices (N, H, W) in [0, 1] float32, clipped to the window, in `levels` steps."""
    return quantise(rescale(images, window), levels)


def to_model_on_device(images, fit: Fit):
    """`to_model` of order 1 in JAX: (B, H, W) float32 -> (B, S, S), equal but for rounding."""
    import jax.numpy as jnp

    sides = images.shape[1:], (fit.height, fit.width)
    rows, columns = (_linear(n, m) for n, m in zip(*sides, strict=True))
    inside = _product(images[..., None], rows, columns)[..., 0]
    margins = [(0, 0)]
    for start, length in ((fit.top, fit.height), (fit.left, fit.width)):
        margins.append((start, fit.size - start - length))
    return jnp.pad(inside, margins)


def logits_to_native(logits, fit: Fit, shape_hw: tuple[int, int]):
    """Logits (B, h, w, K) over the whole input, at any resolution -> (B, H, W, K) float32, in JAX.

    Bilinear at the native pixel centres, never reading logits of the padding. `fit` and
    `shape_hw` are static: the weights are constants of the compiled program.
    """
    _, h, w, _ = logits.shape
    rows = _bilinear(fit.top, fit.height, fit.size, h, shape_hw[0])
    columns = _bilinear(fit.left, fit.width, fit.size, w, shape_hw[1])
    return _product(logits.astype("float32"), rows, columns)


def _product(images, rows: np.ndarray, columns: np.ndarray):
    """Weights (H, h) and (W, w) applied to (B, h, w, K) in JAX."""
    import jax

    exact = jax.lax.Precision.HIGHEST  # TPUs and TF32 would round the interpolation weights
    if not _is_identity(rows):
        images = jax.numpy.einsum("Hh,bhwk->bHwk", rows, images, precision=exact)
    if not _is_identity(columns):
        images = jax.numpy.einsum("Ww,bhwk->bhWk", columns, images, precision=exact)
    return images


def _nearest(source: int, target: int) -> np.ndarray:
    """Source index of each target pixel's centre, in integers: no rounding to disagree about."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


def _resample(images: np.ndarray, axis: int, target: int) -> np.ndarray:
    """Linear along one axis, as a few weighted gathers."""
    taps, weights = _taps(images.shape[axis], target)
    shape = [-1 if a == axis else 1 for a in range(images.ndim)]
    total = np.float32(0)
    for tap, weight in zip(taps.T, weights.T, strict=True):
        total = total + np.take(images, tap, axis) * weight.reshape(shape)
    return total


def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Source indices and float32 weights (target, taps) of a linear resampling."""
    step = source / target
    reach = max(step, 1)
    centres = ((np.arange(target) + 0.5) * step - 0.5)[:, None]
    taps = np.ceil(centres - reach).astype(int) + np.arange(int(2 * reach) + 1)
    weights = np.maximum(0, 1 - np.abs(taps - centres) / reach) * (taps >= 0) * (taps < source)
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
