"""Scoring protocol `release`: the scores of the authors' code (docs/release_code.md#scores).

Only *valid* slices are scored, those in which some organ has at least `min_pixels` pixels, in two
modes: an *item* is one such slice, or the volume of all valid slices of a case. Dice is defined for
the classes in the item's prediction or truth. Hence a missed organ scores 0, a false positive on an
absent class adds a 0 to that class, and a prediction of only background scores 0 in each class of
the truth. The release's "Dice" averages over the classes of each item, then over items; "mcDice"
averages over the items of each class, then over classes. Items without any class are skipped.

Letters: N slices, K classes with the background as id 0.
"""

from collections.abc import Sequence

import numpy as np

from pgpsam_jax.data.cache import slice_areas
from pgpsam_jax.data.fewshot_list import in_pool
from pgpsam_jax.metrics.aggregate import case_mean
from pgpsam_jax.metrics.overlap import dice_of_counts, overlap_counts, slice_dice
from pgpsam_jax.metrics.protocols import COLUMNS, STATUSES, Row

NAME = "release"
SLICE_COLUMNS = ("case", "slice", "class", "dice")


def valid_slices(truth: np.ndarray, num_classes: int, min_pixels: int) -> np.ndarray:
    """Returns the mask (N,) of the slices of a label map (N, H, W) to score."""
    return in_pool(slice_areas(truth, num_classes), "valid", min_pixels)


def mean_slice_dice(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> float:
    """Returns the release's slice-level "Dice" of label maps (N, H, W)."""
    return float(case_mean(slice_dice(prediction, truth, num_classes)))


def score_release(
    prediction: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    *,
    case_id: object,
    min_pixels: int,
    region: np.ndarray | None = None,
) -> tuple[list[Row], list[Row]]:
    """Scores one predicted volume under `release`.

    Args:
        prediction, truth: integer (D, H, W) label maps on the same voxel grid.
        names: K class names, index = id, background first.
        min_pixels: pixels of one organ that make a slice valid.
        region: boolean (D,), slices that may be scored, by default all.

    Returns:
        Rows of `cases.csv` (volume mode, one per organ) and of `slices.csv` (one per slice and
        organ). Status and voxel counts refer to the scored slices only.
    """
    scored = valid_slices(truth, len(names), min_pixels)
    if region is not None:
        scored &= region
    counts = overlap_counts(prediction[scored], truth[scored], len(names))
    volume, rows = counts.sum(axis=1), []
    for class_id, value in enumerate(dice_of_counts(volume).tolist(), start=1):
        _, predicted, true = volume[:, class_id - 1].tolist()
        entries = (str(case_id), class_id, names[class_id], NAME, "dice", value, true, predicted)
        status = STATUSES[true > 0, predicted > 0]
        rows.append(dict(zip(COLUMNS, (*entries, status), strict=True)))
    per_slice = zip(np.flatnonzero(scored).tolist(), dice_of_counts(counts).tolist(), strict=True)
    slices = [
        dict(zip(SLICE_COLUMNS, (str(case_id), index, name, value), strict=True))
        for index, values in per_slice
        for name, value in zip(names[1:], values, strict=True)
    ]
    return rows, slices
