"""From stored intensities to network inputs: normalization, gray levels and letterbox.

Letters: D slices of a volume, N slices, H W native size, S input side.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from pgpsam_jax.data.io.voxel_grid import AXES, AXIAL
from pgpsam_jax.data.letterbox import Letterbox, to_model
from pgpsam_jax.errors import UserError

NORMALIZATIONS = ("window", "percentile", "zscore")
_SAMPLE = 1 << 21  # voxels, enough for quantiles to three digits


class Percentiles(NamedTuple):
    """Window in percent of the voxels of each volume, for intensities without a unit as in MR."""

    low: float
    high: float


class Deviations(NamedTuple):
    """Window in SDs from the mean of each volume, for intensities without a unit.

    Mean and SD are those of the voxels above the volume's minimum, which leaves out the constant
    padding around a body, a stripped skull or a crop and does not depend on unit or offset.
    """

    low: float = -3.0
    high: float = 3.0


Window = tuple[float, float] | Percentiles | Deviations


@dataclass(frozen=True)
class Preprocessing:
    """How volumes become network inputs; the same for training, evaluation and prediction.

    Attributes:
        image_size: S, in pixels.
        window: intensities that map to 0 and 1, the same for all volumes or relative to each.
        levels: gray levels to round down to; 0 = continuous. See `quantize`.
        axis: the axis to slice along, one of `voxel_grid.AXES`.

    Raises:
        UserError: an empty window, or a single gray level.
    """

    image_size: int
    window: Window
    levels: int = 0
    axis: str = AXIAL

    def __post_init__(self):
        low, high = self.window
        if not low < high:
            raise UserError(f"window {(low, high)} is empty; give (low, high) with low < high")
        if self.levels < 0 or self.levels == 1:
            raise UserError(
                f"data.levels is {self.levels}; give 0 (continuous intensities) or the number of "
                "gray levels, 256 for 8 bits"
            )
        if self.axis not in AXES:
            raise ValueError(f"slices are cut along {', '.join(AXES)}, not {self.axis!r}")

    @classmethod
    def from_config(cls, data: ConfigDict, image_size: int) -> "Preprocessing":
        """Returns the preprocessing of `config.data`, whose `axis` is resolved."""
        return cls(image_size, window_of(data), data.levels, data.axis)

    def normalize(self, images: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
        """Maps native slices (N, H, W) to [0, 1] float32; `limits`: `intensity_limits`."""
        return quantize(rescale(images, limits), self.levels)

    def to_model(self, images: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
        """Converts native slices (N, H, W) to network inputs (N, S, S) float32.

        Clips before resizing, or metal at 3000 HU would bleed into its neighbors.
        """
        letterbox = Letterbox.of(images.shape[1:], self.image_size)
        return to_model(self.normalize(images, limits), letterbox, order=1)


def window_of(data: ConfigDict) -> Window:
    """Returns the intensities that `config.data` maps to [0, 1]."""
    kind = data.normalize
    if kind not in NORMALIZATIONS:
        raise UserError(f"data.normalize is {kind!r}; choose from {', '.join(NORMALIZATIONS)}")
    if kind == "zscore":
        return Deviations()
    if kind == "window":
        low, high = map(float, data.window)
        return low, high
    low, high = map(float, data.percentiles)
    if not 0 <= low < high <= 100:
        raise UserError(f"data.percentiles is {(low, high)}; give 0 <= low < high <= 100")
    return Percentiles(low, high)


def is_relative(window: Window) -> bool:
    """Returns whether each volume is normalized by its own intensities."""
    return isinstance(window, Percentiles | Deviations)


def intensity_limits(window: Window, volume: np.ndarray) -> tuple[float, float]:
    """Returns the intensities of a volume (D, H, W) that map to 0 and 1."""
    if not is_relative(window):
        return window
    sample = subsample(volume)
    if isinstance(window, Percentiles):
        low, high = map(float, np.percentile(sample, window))
    else:
        body = sample[sample > sample.min()].astype(np.float64)
        mean, sd = (body.mean(), body.std()) if body.size else (float(sample.min()), 0.0)
        low, high = (float(mean + end * sd) for end in window)
    return (low, high) if low < high else (low, low + 1)


def subsample(values: np.ndarray) -> np.ndarray:
    """Returns a regular subsample (n,) of at most 2^21 values, for quantiles."""
    return values.reshape(-1)[:: -(-values.size // _SAMPLE)]


def rescale(images: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Maps intensities between two limits to [0, 1] float32, clipping the rest."""
    low, high = limits
    out = np.clip(images, low, high)
    place = out if out.dtype.kind == "f" else None
    out = np.divide(np.subtract(out, low, out=place), high - low, out=place)
    return out.astype(np.float32, copy=False)


def normalize_volume(volume: np.ndarray, window: Window) -> np.ndarray:
    """Maps a volume (D, H, W) to [0, 1] float32 for display, in continuous gray levels."""
    return rescale(volume, intensity_limits(window, volume))


def quantize(images: np.ndarray, levels: int) -> np.ndarray:
    """Rounds intensities in [0, 1] down to `levels` equal steps; 0 leaves them continuous.

    The authors' code stores 256 levels: truncated 8-bit images. It uses the extremes of each volume
    as the window, which makes no difference if a CT exceeds the window on both sides.
    """
    if not levels:
        return images
    return np.floor(images * (levels - 1)) / np.float32(levels - 1)
