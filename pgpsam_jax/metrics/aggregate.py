"""Aggregation of scores: means, SDs and confidence intervals over cases, organs and seeds.

Undefined scores are NaN and excluded from every mean. The *class mean* averages over the cases of
each organ first, then over organs; the *case mean* over the organs of each case first.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.protocols import METRICS, Row

INTERVAL = (
    "two-sided 95 % Student t interval of the mean over cases (n cases, sample SD with n - 1)"
)
SMALL_SAMPLE = (
    "n < 50: the nominal 95 % coverage of these intervals is optimistic (about 84 % at n = 12 in "
    "simulations with skewed Dice-like scores)"
)
SMALL = 50


def grouped_note(groups: object) -> str:
    """Returns the sentence about intervals over groups; `groups`: their number."""
    return (
        "Cases of one group, such as a person, are averaged first: intervals and tests are over "
        f"{groups} groups"
    )


def defined_mean(values: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Returns the mean over defined values; NaN (without numpy's warning) where there are none."""
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def class_mean(scores: np.ndarray) -> np.ndarray:
    """Returns the mean over cases, then over organs, of scores (..., N cases, C organs)."""
    return defined_mean(defined_mean(scores, axis=-2), axis=-1)


def case_mean(scores: np.ndarray) -> np.ndarray:
    """Returns the mean over organs, then over cases, of scores (..., N cases, C organs)."""
    return defined_mean(defined_mean(scores, axis=-1), axis=-1)


def spread(values: ArrayLike) -> tuple[float | None, list[float] | None]:
    """Returns sample SD and t interval of the mean; None for fewer than two defined values."""
    scores = np.asarray(values, float)
    scores = scores[np.isfinite(scores)]
    if scores.size < 2:
        return None, None
    sd = float(scores.std(ddof=1))
    half = float(special.stdtrit(scores.size - 1, 0.975)) * sd / math.sqrt(scores.size)
    mean = float(scores.mean())
    return sd, [mean - half, mean + half]


def unit_means(scores: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Averages scores (..., N cases) over the cases of each unit: (..., U), NaN where undefined.

    Args:
        scores: of the N cases.
        units: of each case, the group it belongs to or itself.
    """
    names = np.array(units)
    return np.stack(
        [defined_mean(scores[..., names == unit], axis=-1) for unit in dict.fromkeys(units)],
        axis=-1,
    )


def score_arrays(
    rows: Iterable[Row], protocol: str, cases: Sequence[str], classes: Mapping[int, str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arranges the rows of one protocol as arrays.

    Args:
        rows: rows of `cases.csv`.
        cases: ids of the N cases, in output order.
        classes: {class id: name} of the C classes, in output order.

    Returns:
        {metric: (N, C) values} and (N, C) statuses.

    Raises:
        UserError: a case occurs twice.
    """
    row_of = {case: i for i, case in enumerate(cases)}
    column_of = {key: j for j, key in enumerate(classes)}
    shape = len(cases), len(classes)
    values = {metric: np.full(shape, np.nan) for metric in METRICS[protocol]}
    status = np.full(shape, "", dtype=object)
    seen = set()
    for row in rows:
        if row["protocol"] != protocol:
            continue
        key = row["case"], row["class_id"], row["metric"]
        if key in seen:
            raise UserError(
                f"case {row['case']} was evaluated twice; give each case a unique name."
            )
        seen.add(key)
        index = row_of[row["case"]], column_of[row["class_id"]]
        values[row["metric"]][index] = row["value"]
        status[index] = row["status"]
    return values, status


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one metric and protocol over seeds, cases and organs.

    values: (S, N, C) for S seeds, N cases, C organs; NaN where undefined. groups: of cases that
    count as one in intervals and tests, such as a person's.
    """

    seeds: tuple[int, ...]
    cases: tuple[str, ...]
    organs: tuple[str, ...]
    values: np.ndarray
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def units(self) -> tuple[str, ...]:
        """What each case is counted as, (N,): its group, else the case itself."""
        return tuple(self.groups.get(case, case) for case in self.cases)

    def select(self, seeds: Iterable[int], cases: Iterable[str], organs: Iterable[str]) -> "Scores":
        """Returns the scores of these seeds, cases and organs, in the given order."""
        wanted = tuple(seeds), tuple(cases), tuple(organs)
        axes = self.seeds, self.cases, self.organs
        picks = [[axis.index(key) for key in keys] for axis, keys in zip(axes, wanted, strict=True)]
        return Scores(*wanted, self.values[np.ix_(*picks)], self.groups)

    def common_with(self, other: "Scores") -> tuple["Scores", "Scores"]:
        """Returns both, of the seeds, cases and organs that they share, in the order of `self`."""
        axes = ("seeds", "cases", "organs")
        common = [[k for k in getattr(self, a) if k in getattr(other, a)] for a in axes]
        return self.select(*common), other.select(*common)

    def per_case(self) -> np.ndarray:
        """Returns the mean over seeds, (N, C)."""
        return defined_mean(self.values, axis=0)

    def case_scores(self) -> np.ndarray:
        """Returns the mean over organs of each case, averaged over seeds, (N,)."""
        return defined_mean(defined_mean(self.values, axis=2), axis=0)

    def unit_scores(self) -> np.ndarray:
        """Returns the mean of `case_scores` over the cases of each unit, (U,)."""
        return unit_means(self.case_scores(), self.units)

    def organ_means(self) -> np.ndarray:
        """Returns the mean over cases of each organ, averaged over seeds, (C,)."""
        return defined_mean(defined_mean(self.values, axis=1), axis=0)

    def over_seeds(self, kind: str) -> tuple[float, float | None]:
        """Returns mean and SD (None for one seed) over seeds of the "class" or "case" mean."""
        means = {"class": class_mean, "case": case_mean}[kind](self.values)
        return float(defined_mean(means)), spread(means)[0]


def gather(
    by_seed: Mapping[int, Sequence[Row]],
    protocol: str,
    metric: str,
    groups: Mapping[str, str] | None = None,
) -> Scores | None:
    """Collects the scores of {seed: rows of `cases.csv`} over the cases and organs of all seeds.

    Seeds without rows of the protocol are left out; None if no seed has any.
    """
    by_seed = {
        seed: [row for row in rows if row["protocol"] == protocol] for seed, rows in by_seed.items()
    }
    by_seed = {seed: rows for seed, rows in by_seed.items() if rows}
    if not by_seed:
        return None
    cases, organs = (shared(by_seed.values(), key) for key in ("case", "class"))
    values = []
    for rows in by_seed.values():
        ids = {row["class"]: row["class_id"] for row in rows}
        rows = [row for row in rows if row["case"] in cases and row["class"] in organs]
        arrays, _ = score_arrays(rows, protocol, cases, {ids[name]: name for name in organs})
        values.append(arrays[metric])
    return Scores(tuple(by_seed), cases, organs, np.stack(values), groups or {})


def shared(lists: Iterable[Sequence[Row]], key: str) -> tuple[str, ...]:
    """Returns the values of `key` ("case" or "class") common to all lists, in the first's order."""
    found = [dict.fromkeys(row[key] for row in rows) for rows in lists]
    return tuple(name for name in found[0] if all(name in other for other in found))
