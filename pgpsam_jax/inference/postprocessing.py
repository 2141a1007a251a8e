"""What is done to the probabilities and masks of a whole volume, in NumPy.

SciPy is imported where it is used: a training run starts without. Letters: D slices, H rows, W
columns of a volume, K classes with background.
"""

from collections.abc import Sequence

import numpy as np

_TRUNCATE = 3.0  # SDs at which the Gaussian ends
_NEIGHBORS = np.ones((3, 3, 3), bool)  # corners connect, too


def smooth_slices(probabilities: np.ndarray, deviation: float) -> np.ndarray:
    """Returns probabilities (D, H, W, K) averaged by a Gaussian along D, one class at a time.

    The first and last slice continue outward. deviation: its SD in slices.
    """
    from scipy import ndimage

    out = np.empty_like(probabilities)
    for k in range(probabilities.shape[-1]):
        of_class = probabilities[..., k].astype(np.float32)
        out[..., k] = ndimage.gaussian_filter1d(
            of_class, deviation, axis=0, mode="nearest", truncate=_TRUNCATE
        )
    return out


def keep_components(ids: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Returns class ids (D, H, W) without small connected components, which become background.

    Args:
      ids: class ids.
      shares: for classes 1 to K - 1, the smallest component to keep as a share of the largest; of
        equally large ones none is dropped.
    """
    from scipy import ndimage

    out = ids.copy()
    for k, share in enumerate(shares, 1):
        if not share or not (mask := ids == k).any():
            continue
        box = ndimage.find_objects(mask.astype(np.uint8))[0]
        parts, _ = ndimage.label(mask[box], _NEIGHBORS)
        sizes = np.bincount(parts.ravel())[1:]
        small = np.append(False, sizes < share * sizes.max())
        out[box][small[parts]] = 0
    return out


def uncertainty(probabilities: np.ndarray) -> np.ndarray:
    """Returns the entropy of probabilities (D, H, W, K) as a share of log K, (D, H, W) float32."""
    from scipy import special

    total = np.zeros(probabilities.shape[:-1], np.float32)
    for k in range(probabilities.shape[-1]):
        total += special.entr(probabilities[..., k].astype(np.float32))
    return total / np.float32(np.log(probabilities.shape[-1]))
