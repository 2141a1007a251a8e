"""Geometric augmentation on the accelerator: one smooth warp and one resampling per sample.

Letters: `B` samples, `H W` image rows and columns. Coordinates are pixel indices (row, column),
0 at the centre of the first pixel; pixels are taken to be square. There are no flips: kidneys,
liver and spleen have sides.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pgpsam_jax.errors import UserError

# A cubic B-spline displacement in the plane is one-to-one while it stays below this fraction of
# the control spacing (Choi and Lee, "Injectivity conditions of 2D and 3D uniform cubic B-spline
# functions", Graphical Models 62, 2000).
_NO_FOLD = 0.48


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How often and how strongly a training slice is warped; hashable, so a static argument.

    The paper names elastic deformation, rotation and scaling and gives no figures; frequencies
    and the rotation range are the release's (methods.md 1.4). `exclusive=True` draws at most one
    of the three per sample, as the release does; `False` draws each on its own, so that they
    combine. Probabilities of 0 leave samples bit for bit as they were.

    Attributes:
      rotate_probability, rotate_degrees: angle uniform in +-`rotate_degrees`.
      scale_probability, scale_range: zoom factor (> 1 enlarges), uniform in its logarithm. The
        release only enlarges: (1 / 0.9, 1 / 0.4) with `random_window=True`.
      random_window: zoom about a random place (the visible window stays inside the picture)
        instead of the centre.
      elastic_probability, elastic_amplitude, elastic_grid: cubic B-spline over `elastic_grid`^2
        random control points; no pixel moves further than `elastic_amplitude` (a fraction of the
        side) along either axis, and a third of that is typical.
      exclusive: see above.
      noise_probability, noise_sigma: additive Gaussian noise for images in [0, 1], clipped to
        that range; the release uses 0.3 and 10 / 255.
    """

    rotate_probability: float = 0.3
    rotate_degrees: float = 20.0
    scale_probability: float = 0.2
    scale_range: tuple[float, float] = (0.8, 1.25)
    random_window: bool = False
    elastic_probability: float = 0.3
    elastic_amplitude: float = 0.05
    elastic_grid: int = 8
    exclusive: bool = True
    noise_probability: float = 0.0
    noise_sigma: float = 10 / 255

    def __post_init__(self):
        object.__setattr__(self, "scale_range", tuple(self.scale_range))
        for name in ("rotate", "scale", "elastic", "noise"):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                _refuse(f"{name}_probability is {probability}; give a number from 0 to 1")
        if self.exclusive and sum(self.geometric) > 1 + 1e-9:
            _refuse(
                f"rotate, elastic and scale probabilities {self.geometric} add up to more than 1; "
                "lower them or set exclusive=False"
            )
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            _refuse(f"scale_range is {self.scale_range}; give two zoom factors 0 < low <= high")
        if self.elastic_grid < 4:
            _refuse(f"elastic_grid is {self.elastic_grid}; a cubic spline needs at least 4")
        limit = _NO_FOLD / (self.elastic_grid - 3)
        if not 0 <= self.elastic_amplitude <= limit:
            _refuse(
                f"elastic_amplitude is {self.elastic_amplitude}; with elastic_grid="
                f"{self.elastic_grid} keep it from 0 to {limit:.3f}, beyond which anatomy folds"
            )

    @property
    def geometric(self) -> tuple[float, float, float]:
        """Probabilities of (rotation, elastic, scale)."""
        return self.rotate_probability, self.elastic_probability, self.scale_probability


def _refuse(problem: str):
    raise UserError(f"augmentation settings: {problem}.")


def sample_keys(key, step, positions):
    """(B,) keys from (seed key, step, position in the *global* batch).

    The result does not depend on how many devices or processes share the batch. `step` may be
    traced, so that a jitted train step is compiled once.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda position: jax.random.fold_in(step_key, position))(positions)


def augment(keys, images, labels, config: AugmentConfig):
    """Warp each sample by its own random transform, then add noise where configured.

    Args:
      keys: (B,) PRNG keys, from `sample_keys`.
      images: (B, H, W) floating point, 0 at the lower end of the intensity window.
      labels: (B, H, W) integer class ids, 0 = background.

    Returns:
      images and labels of the same shapes and types.
    """
    return jax.vmap(lambda *sample: _augment_one(*sample, config))(keys, images, labels)


def _augment_one(key, image, label, config):
    warp_key, noise_key = jax.random.split(key)
    if any(config.geometric):
        image, label = resample(image, label, warp_coordinates(warp_key, image.shape, config))
    if config.noise_probability:
        image = _add_noise(noise_key, image, config)
    return image, label


def warp_coordinates(key, shape, config: AugmentConfig):
    """Where each output pixel of one sample is read from: (2, H, W) float32 row, column.

    The source of output point x is A (x + e(x) - c) + c + t: elastic displacement e, rotation
    and zoom A about the centre c, window shift t. Each part is one-to-one, hence so is the
    whole. A sample that draws no transform gets exact pixel indices.
    """
    # All random numbers of a sample in one call: compiling several costs seconds.
    draws = jax.random.uniform(key, (7 + 2 * config.elastic_grid**2,))
    choice, turn, zoom, window, control = jnp.split(draws, (3, 4, 5, 7))
    rotated, deformed, scaled = _choose(choice, config)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    centre = (np.array(shape, np.float32) - 1) / 2
    point = jnp.asarray(grid - centre[:, None, None])
    if config.elastic_probability:
        point += deformed * _displacement(_between(control, -1, 1), shape, config)
    limit = np.deg2rad(config.rotate_degrees)
    angle = rotated * _between(turn, -limit, limit)
    zoom = jnp.exp(scaled * _between(zoom, *np.log(config.scale_range)))
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    turned = jnp.stack([cos * point[0] + sin * point[1], cos * point[1] - sin * point[0]])
    offset = jnp.asarray(centre)
    if config.random_window:
        # Zooming out leaves nothing to choose from: the window is larger than the picture.
        freedom = jnp.maximum(1 - 1 / zoom, 0)
        offset += freedom * centre * _between(window, -1, 1)
    return turned + offset[:, None, None]


def _between(uniform, low: float, high: float):
    """Draws from [0, 1) moved to [low, high)."""
    return low + (high - low) * uniform


def _choose(draws, config):
    """(3,) of 0.0 or 1.0: whether this sample is rotated, deformed, scaled."""
    probability = np.array(config.geometric)
    if config.exclusive:
        # One draw falls into one of adjoining intervals, or past them all.
        edge = np.concatenate([[0], np.cumsum(probability)]).astype(np.float32)
        draws, low, high = draws[0], edge[:-1], edge[1:]
    else:
        low, high = 0, probability.astype(np.float32)
    return ((draws >= low) & (draws < high)).astype(jnp.float32)


def _displacement(control, shape, config):
    """(2, H, W) shift in pixels from 2 n^2 numbers in [-1, 1): a thin matrix product per axis."""
    control = control.reshape(2, config.elastic_grid, config.elastic_grid)
    reach = config.elastic_amplitude * np.array(shape, np.float32)
    rows, columns = (_spline_weights(size, config.elastic_grid) for size in shape)
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


def resample(image, label, coordinates):
    """Read (H, W) image (bilinear) and label (nearest, half up) at the same (2, H, W) points.

    Outside the picture both are 0: the lower end of the intensity window (air, in CT) and
    background. Repeating or reflecting the border would draw anatomy that is not there, and
    label it. Equals `scipy.ndimage.map_coordinates` with `mode="grid-constant"`, orders 1 and 0.
    """
    row, below = _cell(coordinates[0], image.shape[0])
    column, right = _cell(coordinates[1], image.shape[1])
    # Both pictures get a border of one zero pixel, so that every neighbour exists.
    stride = image.shape[1] + 2
    corner = (row + 1) * stride + column + 1
    pixels = jnp.pad(image, 1).ravel()
    top = _blend(_take(pixels, corner), _take(pixels, corner + 1), right)
    bottom = _blend(_take(pixels, corner + stride), _take(pixels, corner + stride + 1), right)
    nearest = corner + (below >= 0.5) * stride + (right >= 0.5)
    warped = _blend(top, bottom, below).astype(image.dtype)
    return warped, _take(jnp.pad(label, 1).ravel(), nearest)


def _cell(coordinate, size: int):
    """The pixel at or before a coordinate, from -1 to size - 1, and the fraction past it."""
    coordinate = jnp.clip(coordinate, -1, size)
    first = jnp.clip(jnp.floor(coordinate), -1, size - 1)
    return first.astype(jnp.int32), coordinate - first


def _blend(first, second, fraction):
    return (1 - fraction) * first + fraction * second


def _take(flat, index):
    return flat.at[index].get(mode="promise_in_bounds")


def _add_noise(key, image, config):
    choice_key, value_key = jax.random.split(key)
    noise = config.noise_sigma * jax.random.normal(value_key, image.shape, image.dtype)
    noisy = jnp.clip(image + noise, 0, 1)
    return jnp.where(jax.random.uniform(choice_key) < config.noise_probability, noisy, image)
