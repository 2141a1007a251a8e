"""Geometric augmentation of one training slice: sampling coordinates and resampling.

Letters: `H W` image rows and columns. Coordinates are pixel indices (row, column), 0 at the
center of the first pixel; pixels are assumed to be square.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.data.augmentation.sampling import between, one_of

# Constants of the release's elastic deformation (docs/release_code.md#augmentation), as fractions
# of the image side. The release warps slices of 512 px, its smoothed noise multiplied by 2 x 512.
_JITTER = 0.08
_SIGMA = 0.08
_AMPLITUDE = 2 / 512
_NODES = 32  # random numbers per axis of the smooth displacement


def warp_coordinates(key, shape, config: AugmentConfig):
    """Samples a random warp of one image.

    The source of output point x is A (e(x) - c) + c + t: elastic map e, rotation and zoom A about
    the center c, window shift t. Each part is one-to-one, so their composition is too, except at
    the border, which the "gaussian" map mirrors. Without any transform, coordinates are exact pixel
    indices.

    Returns:
        Source coordinates (2, H, W) float32 (row, column) of each output pixel, and (3,) flags of
        0.0 or 1.0: rotated, deformed, scaled.
    """
    # One call for all random numbers of a sample: compiling several calls costs seconds.
    spline = config.elastic == "spline"
    controls = 2 * config.elastic_grid**2 if spline else 6 + 2 * _NODES**2
    uniform = jax.random.uniform(key, (7 + controls,))
    choice, turn, zoom, window, control = jnp.split(uniform, (3, 4, 5, 7))
    active = _active_transforms(choice, config)
    rotated, deformed, scaled = active
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    center = (np.array(shape, np.float32) - 1) / 2
    point = jnp.asarray(grid - center[:, None, None])
    if config.elastic_probability:
        control = between(control, -1, 1)
        if spline:
            point += deformed * _displacement(control, shape, config)
        else:
            place = _affine_and_smooth(control, grid.astype(np.float32))
            point = jnp.where(deformed > 0, place - center[:, None, None], point)
    angle = rotated * _angle(turn, config)
    zoom = _zoom(zoom, scaled, config)
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    turned = jnp.stack([cos * point[0] + sin * point[1], cos * point[1] - sin * point[0]])
    offset = jnp.asarray(center)
    if config.random_window:
        # When zoomed out, the window is larger than the image and cannot shift.
        freedom = jnp.maximum(1 - 1 / zoom, 0)
        offset += freedom * center * between(window, -1, 1)
    return turned + offset[:, None, None], active


def _active_transforms(uniform, config):
    """Samples (3,) flags of 0.0 or 1.0: rotated, deformed, scaled."""
    if config.exclusive:
        chosen = one_of(uniform[0], config.geometric)
    else:
        chosen = uniform < np.array(config.geometric, np.float32)
    return chosen.astype(jnp.float32)


def _angle(uniform, config):
    """Rotation in radians."""
    degrees = config.rotate_degrees
    if config.whole_degrees:
        return jnp.deg2rad(jnp.floor(between(uniform, -degrees, degrees)))
    return between(uniform, -np.deg2rad(degrees), np.deg2rad(degrees))


def _zoom(uniform, scaled, config):
    """Zoom factor of a sample; 1 if it is not scaled."""
    low, high = config.scale_range
    if config.random_window:
        return 1 / jnp.where(scaled > 0, between(uniform, 1 / high, 1 / low), 1)
    return jnp.exp(scaled * between(uniform, np.log(low), np.log(high)))


def _displacement(control, shape, config):
    """Spline displacement (2, H, W) in pixels from 2 n^2 numbers in [-1, 1)."""
    rows, columns = (_spline_weights(size, config.elastic_grid) for size in shape)
    return _smooth(control, rows, columns, config.elastic_amplitude)


def _smooth(control, rows, columns, amplitude: float):
    """Interpolates the controls to (2, H, W) pixels, times `amplitude` (fraction of the side)."""
    reach = amplitude * np.array([len(rows), len(columns)], np.float32)
    control = control.reshape(2, rows.shape[1], columns.shape[1])
    # The default matmul precision of TPUs and GPUs (bf16, TF32) is too coarse for coordinates.
    smooth = jnp.einsum("hi,aij,wj->ahw", rows, control, columns, precision="highest")
    return reach[:, None, None] * smooth


def _spline_weights(size: int, controls: int):
    """Uniform cubic B-spline weights (size, controls); each row sums to 1."""
    position = np.linspace(1, controls - 2, size)[:, None]
    distance = np.abs(position - np.arange(controls))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _affine_and_smooth(control, grid):
    """Source points (2, H, W) of the release's elastic map, from 6 + 2 n^2 numbers in [-1, 1).

    The release warps an image by an affine map (border mirrored about the centers of the outermost
    pixels), then by a smooth displacement (border mirrored about their outer edges).
    """
    shape = grid.shape[1:]
    rows, columns = (_gaussian_weights(size) for size in shape)
    place = grid + _smooth(control[6:], rows, columns, _AMPLITUDE)
    place = _mirrored(place, shape, 0.5)
    return _mirrored(_affine(control[:6].reshape(3, 2), place), shape, 0)


def _gaussian_weights(size: int):
    """Gaussian weights (size, n), centered on n strips and scaled to the noise of their area.

    The release smooths one random number per pixel, with zeros outside the image, which halves the
    variance at the border. One number per strip gives the same variances and correlations to 0.4 %
    with two thousand numbers instead of half a million.
    """
    place, node = ((np.arange(n) + 0.5) / n for n in (size, _NODES))
    bell = np.exp(-(((place[:, None] - node) / _SIGMA) ** 2) / 2) / (_SIGMA * np.sqrt(2 * np.pi))
    return (bell / np.sqrt(_NODES)).astype(np.float32)


def _affine(jitter, place):
    """Source points of the affine map that moves three corners of a square by (3, 2) `jitter`.

    The corners are a third of the side from the center: bottom right, top right, top left.
    """
    shape = np.array(place.shape[1:])
    arm, middle = min(shape) // 3, shape // 2
    corner = middle + np.array([-arm, arm])
    jitter = _JITTER * shape * jitter
    along = (jitter[:2] - jitter[1:]) / (2 * arm)  # change of the unit step down, and right
    (a, b), (c, d) = jnp.eye(2) + along.T
    row, column = place - (corner + jitter[1])[:, None, None]
    inverse = jnp.stack([d * row - b * column, a * column - c * row]) / (a * d - b * c)
    return inverse + corner[:, None, None]


def _mirrored(place, shape, margin: float):
    """Reflects points at the border, `margin` pixels outside the outermost pixel centers."""
    last = np.array(shape, np.float32)[:, None, None] - 1
    span = last + 2 * margin
    inside = span - jnp.abs(jnp.mod(place + margin, 2 * span) - span) - margin
    return jnp.clip(inside, 0, last)


def resample(image, label, coordinates):
    """Samples (H, W) image (bilinear) and label (nearest, half up) at the same (2, H, W) points.

    Both are 0 outside the image: the lower end of the intensity window (air, in CT) and background.
    Repeating or reflecting the border would invent labeled anatomy. Equals
    `scipy.ndimage.map_coordinates` with `mode="grid-constant"`, orders 1 and 0.
    """
    # JAX rounds half away from 0, so -0.5 would fall outside.
    rows_columns = jnp.where(coordinates == -0.5, 0, coordinates)
    return bilinear(image, coordinates), map_coordinates(label, [*rows_columns], order=0)


def bilinear(image, coordinates):
    """Samples (H, W) bilinearly at (2, H, W) points; 0 outside."""
    return map_coordinates(image, coordinates, order=1)
