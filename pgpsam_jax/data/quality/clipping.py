"""Labeled voxels that normalization clips to black or white, where contrast is lost."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pgpsam_jax.data.preprocessing import Deviations, Percentiles, Window

_MAX_CLIPPED = 0.05  # fraction of the labeled voxels of a case


def describe(values: np.ndarray, limits: tuple[float, float]) -> dict[str, Any] | None:
    """Returns which fractions of the labeled voxels of a case lie outside the limits.

    Args:
        values: (n,) intensities of the labeled voxels; None is returned if there are none.
        limits: of `preprocessing.intensity_limits`.

    Returns:
        Fractions `below` and `above`, and `range`: the 0.5 % and 99.5 % quantiles of the values.
    """
    if not len(values):
        return None
    return {
        "below": float(np.mean(values < limits[0])),
        "above": float(np.mean(values > limits[1])),
        "range": np.quantile(values, (0.005, 0.995)).astype(float).tolist(),
    }


def message(clipped: Mapping[str, dict[str, Any] | None], window: Window) -> str | None:
    """Returns one sentence about all cases of which more than 5 % is clipped, None without any.

    Args:
        clipped: of each case, by `describe`.
        window: the setting of the data set.
    """
    shares = {case: found["below"] + found["above"] for case, found in clipped.items() if found}
    many = [case for case, share in shares.items() if share > _MAX_CLIPPED]
    if not many:
        return None
    worst = max(many, key=lambda case: shares[case])
    found = clipped[worst]
    assert found is not None
    low, high = found["range"]
    setting, remedy = _setting(window)
    return (
        f"{setting} clips more than {_MAX_CLIPPED:.0%} of the labeled voxels in {len(many)} of "
        f"{len(clipped)} cases, where contrast is lost, most in {worst} ({found['below']:.0%} "
        f"below, {found['above']:.0%} above; they range from {low:.4g} to {high:.4g}): {remedy}"
    )


def _setting(window: Window) -> tuple[str, str]:
    """Names the setting and what to do about it."""
    ends = f"({window[0]:g}, {window[1]:g})"
    if isinstance(window, Percentiles):
        return f"data.percentiles {ends}", "widen data.percentiles"
    if isinstance(window, Deviations):
        return "data.normalize zscore", "set data.normalize=percentile"
    return f"data.window {ends}", "widen data.window to cover them"
