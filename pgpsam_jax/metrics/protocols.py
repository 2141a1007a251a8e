"""Scoring protocols `strict` and `transunet`, and definitions shared by all protocols.

Both use `surface`; they differ for organs absent from the truth, the prediction or both:

| status       | truth | prediction | strict (mm)              | transunet (voxels)  |
|--------------|-------|------------|--------------------------|---------------------|
| both_empty   | -     | -          | all NaN                  | Dice 0, HD95 0      |
| missed       | yes   | -          | Dice 0, NSD 0, HD95 NaN  | Dice 0, HD95 0      |
| hallucinated | -     | yes        | Dice 0, NSD 0, HD95 NaN  | Dice 1, HD95 0      |
| ok           | yes   | yes        | Dice, directed HD95, NSD | Dice, pooled HD95   |

`transunet` is the convention of the published tables of this model family, flaws included (a
hallucinated organ scores Dice 1, a missed one HD95 0), for comparison with those tables; judge
models by `strict`. The third protocol, `release`, is in `release_protocol`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics import surface
from pgpsam_jax.metrics.overlap import overlap_counts

Row = dict[str, Any]  # of a table of scores

NAN = float("nan")
COLUMNS = tuple(
    "case class_id class protocol metric value truth_voxels predicted_voxels status".split()
)
STATUSES = {  # (in the truth, in the prediction) -> status
    (False, False): "both_empty",
    (True, False): "missed",
    (False, True): "hallucinated",
    (True, True): "ok",
}


@dataclass(frozen=True)
class Organ:
    """An organ that truth and prediction both have.

    Attributes:
        both, predicted, true: voxels in both maps, in the prediction, in the truth.
        in_mm, in_voxels: distances between the surfaces, both ways (see `surface.point_distances`).
        tolerance_mm: tolerance of the NSD.
    """

    both: int
    predicted: int
    true: int
    in_mm: tuple[np.ndarray, np.ndarray]
    in_voxels: tuple[np.ndarray, np.ndarray]
    tolerance_mm: float


@dataclass(frozen=True)
class Metric:
    """The formula of a metric, and its values where truth or prediction lack the organ."""

    formula: Callable[[Organ], float]
    both_empty: float = NAN
    missed: float = NAN
    hallucinated: float = NAN


def _dice(organ: Organ) -> float:
    return 2.0 * organ.both / (organ.predicted + organ.true)


FORMULAS = {
    "strict": {
        "dice": Metric(_dice, missed=0.0, hallucinated=0.0),
        "hd95": Metric(lambda organ: surface.directed_percentile(*organ.in_mm)),
        "nsd": Metric(
            lambda organ: surface.share_within(*organ.in_mm, organ.tolerance_mm),
            missed=0.0,
            hallucinated=0.0,
        ),
    },
    "transunet": {
        "dice": Metric(_dice, both_empty=0.0, missed=0.0, hallucinated=1.0),
        "hd95": Metric(lambda organ: surface.pooled_percentile(*organ.in_voxels), 0.0, 0.0, 0.0),
    },
}
METRICS: dict[str, Collection[str]] = {**FORMULAS, "release": ("dice",)}
DEFINITIONS = {
    "strict": "distances in mm between voxel-center surfaces (6-connected erosion); HD95 is the "
    "larger of the two directed 95th percentiles; NSD is the share of surface voxels within the "
    "tolerance; an organ absent from truth and prediction is left out, one absent from one of "
    "them has Dice 0, NSD 0 and no HD95 (counted as missed or hallucinated)",
    "transunet": "distances in voxels; HD95 is the 95th percentile of both directions pooled; an "
    "organ absent from both or from the prediction has Dice 0 and HD95 0, one absent from the "
    "truth only has Dice 1 and HD95 0 (the rule of the published tables, rewarding both failures)",
    "release": "valid slices only (those where some organ has enough pixels), so false positives "
    "in slices without organs do not count; an item is such a slice, or the volume of them; an "
    "organ absent from truth and prediction of an item is left out, one absent from one of them "
    "has Dice 0; "
    '"Dice" is the mean over items of their mean over organs (for volumes the case mean), "mcDice" '
    "the mean over organs of their mean over items (the class mean)",
}


def score_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    names: Sequence[str],
    *,
    case_id: object,
    nsd_tolerance_mm: float = 2.0,
    region: np.ndarray | None = None,
) -> list[Row]:
    """Scores one predicted volume under `strict` and `transunet`. Pure and picklable.

    Args:
        prediction, truth: integer (D, H, W) label maps on the same voxel grid.
        spacing: mm along (D, H, W).
        names: K class names, index = id, background first (not scored).
        nsd_tolerance_mm: tolerance of the NSD.
        region: boolean (D,), slices to score (see `surface`), by default all; status and voxel
            counts refer to these slices only.

    Returns:
        Rows with the keys `COLUMNS`, one per organ, metric and protocol.

    Raises:
        UserError: shapes differ or a label has no name.
    """
    _check(prediction, truth, names, case_id)
    if region is not None:
        region = np.asarray(region, bool)
        if region.shape != truth.shape[:1]:
            raise ValueError(f"region has shape {region.shape}, expected {truth.shape[:1]}")
    counts = overlap_counts(prediction, truth, len(names))
    counts = counts[:, slice(None) if region is None else region].sum(axis=1)
    surfaces = [surface.surface_points(volume) for volume in (prediction, truth)]
    rows = []
    for class_id in range(1, len(names)):
        ours, theirs = (points[ids == class_id] for points, ids in surfaces)
        both, predicted, true = counts[:, class_id - 1].tolist()
        status, organ = STATUSES[true > 0, predicted > 0], None
        if status == "ok":
            spacings = spacing, (1.0, 1.0, 1.0)
            in_mm, in_voxels = surface.point_distances(ours, theirs, spacings, region)
            organ = Organ(both, predicted, true, in_mm, in_voxels, nsd_tolerance_mm)
        start, end = (str(case_id), class_id, names[class_id]), (true, predicted, status)
        for protocol, metrics in FORMULAS.items():
            for name, metric in metrics.items():
                value = metric.formula(organ) if organ else getattr(metric, status)
                entries = (*start, protocol, name, float(value), *end)
                rows.append(dict(zip(COLUMNS, entries, strict=True)))
    return rows


def _check(
    prediction: np.ndarray, truth: np.ndarray, names: Sequence[str], case_id: object
) -> None:
    if prediction.shape != truth.shape:
        raise UserError(
            f"case {case_id}: prediction {prediction.shape} and label {truth.shape} differ in "
            "shape; predict on the voxel grid of the label."
        )
    for what, volume in (("prediction", prediction), ("label", truth)):
        low, high = (int(volume.min()), int(volume.max())) if volume.size else (0, 0)
        if low < 0 or high >= len(names):
            raise UserError(
                f"case {case_id}: the {what} has class {low if low < 0 else high}, but the label "
                f"table has only ids 0 to {len(names) - 1}; use the label table of this data set."
            )
