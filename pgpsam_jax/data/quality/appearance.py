"""Intensity and size statistics of a run's training cases, to compare new volumes with.

A network silently predicts nonsense on images unlike its training data. The workdir keeps the
statistics of the training cases, and each volume to predict is checked against them.
Letters: Q quantiles.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.data.preprocessing import Window, is_relative, subsample
from pgpsam_jax.utils.untrusted_text import read_user_json

FILE = "training_data.json"
SCHEMA = 1
QUANTILES = (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)
_LOW, _HIGH = QUANTILES.index(0.05), QUANTILES.index(0.95)
# Chosen on the phantom, one real CT and 40 hippocampus MRs: cases of one data set stay well inside;
# volumes with a lost intercept or another scale are far outside.
_ENDS = 0.25  # of the window
_SHARE = 0.25  # of the smallest share in training
_WIDTH, _SLICES = 1.5, 3.0  # factors


def describe(image: np.ndarray, ids: np.ndarray | None = None) -> dict:
    """Returns quantiles (Q,) of a volume and of its labeled voxels, from a regular sample.

    Args:
        image, ids: (D, H, W) intensities and label ids.

    Returns:
        `whole` and `foreground` quantiles, and `share`, the fraction of the volume with intensities
        between the 5 % and 95 % quantiles of labeled voxels. `foreground` and `share` are None
        without labeled voxels.
    """
    sample = subsample(image)
    found: dict[str, Any] = {"whole": _quantiles(sample), "foreground": None, "share": None}
    labeled = image[:0] if ids is None else image[ids > 0]
    if len(labeled):
        found["foreground"] = _quantiles(subsample(labeled))
        found["share"] = _share(sample, found["foreground"][_LOW], found["foreground"][_HIGH])
    return found


def training_statistics(cached: Sequence, *, window: Window, layout: str) -> dict:
    """Returns the ranges over training cases (`cache.CachedCase`) as plain JSON."""
    described = [case.meta["appearance"] for case in cached]
    labeled = [found for found in described if found["foreground"]]
    return {
        "schema": SCHEMA,
        "cases": len(cached),
        "layout": layout,
        "window": list(window),
        "relative": is_relative(window),
        "quantiles": list(QUANTILES),
        "whole": _ranges([found["whole"] for found in described]),
        "foreground": _ranges([found["foreground"] for found in labeled]),
        "share": _ranges([[found["share"]] for found in labeled]),
        "spacing_mm": _ranges([case.spacing for case in cached]),
        "width_mm": _ranges([[slice_width(case.shape, case.spacing)] for case in cached]),
    }


def read_statistics(workdir) -> dict | None:
    """Reads the training statistics of a workdir; None for runs of earlier versions."""
    path = Path(workdir) / FILE
    if not path.is_file():
        return None
    value = read_user_json(path, "record of training data")
    return value if isinstance(value, dict) and value.get("schema") == SCHEMA else None


def differences(volume: Volume, statistics: dict) -> list[str]:
    """Describes how a volume differs from the training cases, one sentence per difference."""
    found = _intensities(subsample(volume.array), statistics)
    if statistics["layout"] == "transunet":  # its files carry no voxel size
        return found
    width, (low, high) = slice_width(volume.array.shape, volume.spacing), statistics["width_mm"][0]
    if not low / _WIDTH <= width <= high * _WIDTH:
        found.append(
            f"its slices are {width:.0f} mm wide, but the training slices {_range(low, high)} mm, "
            "so organs appear at a different size: check its voxel size, or crop or pad it"
        )
    thick, (low, high) = volume.spacing[0], statistics["spacing_mm"][0]
    if len(volume.array) > 1 and not low / _SLICES <= thick <= high * _SLICES:
        found.append(
            f"its slices are {thick:.3g} mm apart, but the training slices {_range(low, high)} mm: "
            "check its voxel size"
        )
    return found


def _intensities(sample: np.ndarray, statistics: dict) -> list[str]:
    # Volumes that are normalized by their own intensities; formerly by percentiles only.
    if statistics.get("relative", statistics.get("percentiles")):
        return []
    (low, high), whole = statistics["window"], _quantiles(sample)
    if statistics["layout"] == "transunet" and (whole[0] < low - 1 or whole[-1] > high + 1):
        return [
            f"its intensities, {_range(whole[0], whole[-1])}, are not normalized to {low:g} to "
            f"{high:g} like the training slices of this run: normalize them the same way "
            "(TransUNet: HU clipped to -125 to 275, then scaled to 0 to 1)"
        ]
    ends = []
    for place, name in ((0, "darkest"), (-1, "brightest")):
        seen = [_in_window(v, low, high) for v in statistics["whole"][place]]
        value = _in_window(whole[place], low, high)
        if not seen[0] - _ENDS <= value <= seen[1] + _ENDS:
            least, most = statistics["whole"][place]
            ends.append(f"{name} {whole[place]:.4g}, in training {_range(least, most)}")
    if statistics["foreground"] and not ends:
        least, most = statistics["foreground"][_LOW][0], statistics["foreground"][_HIGH][1]
        share, usual = _share(sample, least, most), statistics["share"][0]
        if share < _SHARE * usual[0]:
            ends.append(
                f"only {share:.1%} of the volume is within {least:.4g} to {most:.4g}, the range of "
                f"labeled voxels, in training {_range(100 * usual[0], 100 * usual[1])} %"
            )
    if not ends:
        return []
    return [
        f"its intensities differ from those of the training data ({'; '.join(ends)}): check its "
        "unit, scale and intercept"
    ]


def slice_width(shape, spacing) -> float:
    """Longer side of a slice in mm, which fills the network's input."""
    return max(n * s for n, s in zip(shape[1:], spacing[1:], strict=True))


def _in_window(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(f"{q:.6g}") for q in np.quantile(values.astype(np.float64), QUANTILES)]


def _share(values: np.ndarray, low: float, high: float) -> float:
    return round(float(np.mean((values >= low) & (values <= high))), 5)


def _ranges(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Minimum and maximum of each column; [] without rows."""
    return [[float(min(column)), float(max(column))] for column in zip(*rows, strict=True)]


def _range(low: float, high: float) -> str:
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"
