"""The smooth warp of one training slice: where each pixel is read from, and the reading.

Letters: `H W` image rows and columns. Coordinates are pixel indices (row, column), 0 at the
centre of the first pixel; pixels are taken to be square.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from pgpsam_jax.config.augmentation import AugmentConfig
from pgpsam_jax.data.augmentation.sampling import between, one_of

# Figures of the release's elastic deformation (docs/release_code.md#augmentation), as fractions of
# the side. It warps stored slices of 512 px, where its smoothed noise is multiplied by 2 x 512.
_JITTER = 0.08
_SIGMA = 0.08
_AMPLITUDE = 2 / 512
_NODES = 32  # random numbers per axis for its smooth displacement


def warp_coordinates(key, shape, config: AugmentConfig):
    """Where each output pixel of one sample is read from: (2, H, W) float32 row, column.

    The source of output point x is A (e(x) - c) + c + t: elastic map e, rotation and zoom A about
    the centre c, window shift t. Each part is one-to-one, hence so is the whole, but for the
    picture's border, which the "gaussian" map mirrors. A sample that draws no transform gets exact
    pixel indices. Also returned: (3,) of 0.0 or 1.0, whether it is rotated, deformed, scaled.
    """
    # All random numbers of a sample in one call: compiling several costs seconds.
    spline = config.elastic == "spline"
    controls = 2 * config.elastic_grid**2 if spline else 6 + 2 * _NODES**2
    draws = jax.random.uniform(key, (7 + controls,))
    choice, turn, zoom, window, control = jnp.split(draws, (3, 4, 5, 7))
    active = _choose(choice, config)
    rotated, deformed, scaled = active
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    centre = (np.array(shape, np.float32) - 1) / 2
    point = jnp.asarray(grid - centre[:, None, None])
    if config.elastic_probability:
        control = between(control, -1, 1)
        if spline:
            point += deformed * _displacement(control, shape, config)
        else:
            place = _affine_and_smooth(control, grid.astype(np.float32))
            point = jnp.where(deformed > 0, place - centre[:, None, None], point)
    angle = rotated * _angle(turn, config)
    zoom = _zoom(zoom, scaled, config)
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    turned = jnp.stack([cos * point[0] + sin * point[1], cos * point[1] - sin * point[0]])
    offset = jnp.asarray(centre)
    if config.random_window:
        # Zooming out leaves nothing to choose from: the window is larger than the picture.
        freedom = jnp.maximum(1 - 1 / zoom, 0)
        offset += freedom * centre * between(window, -1, 1)
    return turned + offset[:, None, None], active


def _choose(draws, config):
    """(3,) of 0.0 or 1.0: whether this sample is rotated, deformed, scaled."""
    if config.exclusive:
        chosen = one_of(draws[0], config.geometric)
    else:
        chosen = draws < np.array(config.geometric, np.float32)
    return chosen.astype(jnp.float32)


def _angle(draw, config):
    """Radians."""
    degrees = config.rotate_degrees
    if config.whole_degrees:
        return jnp.deg2rad(jnp.floor(between(draw, -degrees, degrees)))
    return between(draw, -np.deg2rad(degrees), np.deg2rad(degrees))


def _zoom(draw, scaled, config):
    """The factor of a sample; 1 where it is not scaled."""
    low, high = config.scale_range
    if config.random_window:
        return 1 / jnp.where(scaled > 0, between(draw, 1 / high, 1 / low), 1)
    return jnp.exp(scaled * between(draw, np.log(low), np.log(high)))


def _displacement(control, shape, config):
    """(2, H, W) shift in pixels from 2 n^2 numbers in [-1, 1): a thin matrix product per axis."""
    weights = (_spline_weights(size, config.elastic_grid) for size in shape)
    return _smooth(control, *weights, config.elastic_amplitude)


def _smooth(control, rows, columns, amplitude: float):
    """(2, H, W) in pixels: `amplitude` (a fraction of the side) times the controls, spread out."""
    reach = amplitude * np.array([len(rows), len(columns)], np.float32)
    control = control.reshape(2, rows.shape[1], columns.shape[1])
    # Default matmul precision on TPUs and GPUs is bf16 or TF32: too coarse for coordinates.
    smooth = jnp.einsum("hi,aij,wj->ahw", rows, control, columns, precision="highest")
    return reach[:, None, None] * smooth


def _spline_weights(size: int, controls: int):
    """(size, controls) uniform cubic B-spline weights; every row sums to 1."""
    position = np.linspace(1, controls - 2, size)[:, None]
    distance = np.abs(position - np.arange(controls))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _affine_and_smooth(control, grid):
    """(2, H, W) source points of the release's elastic draw, from 6 + 2 n^2 numbers in [-1, 1).

    The release moves a picture by an affine map, its border mirrored about the outermost pixels,
    and the result by a smooth displacement, mirrored about their outer edges.
    """
    shape = grid.shape[1:]
    weights = (_gaussian_weights(size) for size in shape)
    place = grid + _smooth(control[6:], *weights, _AMPLITUDE)
    place = _mirrored(place, shape, 0.5)
    return _mirrored(_affine(control[:6].reshape(3, 2), place), shape, 0)


def _gaussian_weights(size: int):
    """(size, n) Gaussians about the middles of n strips, scaled to the noise of their area.

    The release smooths a random number per pixel, with zeros outside the picture, so that the
    border has half the variance. As many numbers as there are strips give the same variances and
    correlations to 0.4 %, and it takes two thousand of them instead of half a million.
    """
    place, node = ((np.arange(n) + 0.5) / n for n in (size, _NODES))
    bell = np.exp(-(((place[:, None] - node) / _SIGMA) ** 2) / 2) / (_SIGMA * np.sqrt(2 * np.pi))
    return (bell / np.sqrt(_NODES)).astype(np.float32)


def _affine(jitter, place):
    """Points read by the affine map that moves three corners of a square by (3, 2) `jitter`.

    The corners lie a third of the side from the middle: down right, up right, up left.
    """
    shape = np.array(place.shape[1:])
    arm, middle = min(shape) // 3, shape // 2
    corner = middle + np.array([-arm, arm])
    jitter = _JITTER * shape * jitter
    along = (jitter[:2] - jitter[1:]) / (2 * arm)  # change of the step down, of the step right
    (a, b), (c, d) = jnp.eye(2) + along.T
    row, column = place - (corner + jitter[1])[:, None, None]
    inverse = jnp.stack([d * row - b * column, a * column - c * row]) / (a * d - b * c)
    return inverse + corner[:, None, None]


def _mirrored(place, shape, margin: float):
    """Points outside the picture reflected into it, `margin` pixels beyond the outermost ones."""
    last = np.array(shape, np.float32)[:, None, None] - 1
    span = last + 2 * margin
    inside = span - jnp.abs(jnp.mod(place + margin, 2 * span) - span) - margin
    return jnp.clip(inside, 0, last)


def resample(image, label, coordinates):
    """Samples (H, W) image (bilinear) and label (nearest, half up) at the same (2, H, W) points.

    Both are 0 outside the image: the lower end of the intensity window (air, in CT) and background.
    Repeating or reflecting the border would draw anatomy that is not there, and label it. Equals
    `scipy.ndimage.map_coordinates` with `mode="grid-constant"`, orders 1 and 0.
    """
    # JAX rounds half away from 0, which would put this one outside.
    rows_columns = jnp.where(coordinates == -0.5, 0, coordinates)
    return bilinear(image, coordinates), map_coordinates(label, rows_columns, order=0)


def bilinear(image, coordinates):
    """Samples (H, W) bilinearly at (2, H, W) points; 0 outside."""
    return map_coordinates(image, coordinates, order=1)
