"""Scores as arrays: rows of `cases.csv` to means, spreads and, over seeds, the `Scores` of a row.

Undefined scores are NaN and left out of every mean. The *class mean* averages the cases of an organ
first and the organs afterwards, the *case mean* the organs of a case first.
"""

import dataclasses
import math

import numpy as np
from scipy import special

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.protocols import METRICS

INTERVAL = (
    "two-sided 95 % Student t interval of the mean over cases (n cases, sample SD with n - 1)"
)
SMALL_SAMPLE = (
    "n < 50: the nominal 95 % coverage of these intervals is optimistic (about 84 % at n = 12 in "
    "simulations with skewed Dice-like scores)"
)
SMALL = 50


def defined_mean(values, axis=None):
    """Mean over what is defined, NaN (without numpy's warning) where nothing is."""
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def spread(values) -> tuple[float | None, list[float] | None]:
    """Sample SD and t interval of the mean; None for fewer than two defined values."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if values.size < 2:
        return None, None
    sd = float(values.std(ddof=1))
    half = float(special.stdtrit(values.size - 1, 0.975)) * sd / math.sqrt(values.size)
    mean = float(values.mean())
    return sd, [mean - half, mean + half]


def score_arrays(rows, protocol, cases, classes):
    """{metric: (cases, classes) values} and the statuses of one protocol.

    classes: {class id: name}. Raises `UserError` where a case occurs twice.
    """
    place = {case: i for i, case in enumerate(cases)}, {key: j for j, key in enumerate(classes)}
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
                f"case {row['case']} was evaluated twice; give every case a name of its own."
            )
        seen.add(key)
        where = place[0][row["case"]], place[1][row["class_id"]]
        values[row["metric"]][where] = row["value"]
        status[where] = row["status"]
    return values, status


@dataclasses.dataclass(frozen=True)
class Scores:
    """One metric of one protocol for the seeds of one row of a table.

    values: (S, N, C), S seeds, N cases, C organs; NaN where undefined.
    """

    seeds: tuple[int, ...]
    cases: tuple[str, ...]
    organs: tuple[str, ...]
    values: np.ndarray

    def select(self, seeds, cases, organs) -> "Scores":
        """These seeds, cases and organs only, in the order given."""
        wanted = tuple(seeds), tuple(cases), tuple(organs)
        axes = self.seeds, self.cases, self.organs
        picks = [[axis.index(key) for key in keys] for axis, keys in zip(axes, wanted, strict=True)]
        return Scores(*wanted, self.values[np.ix_(*picks)])

    def per_case(self) -> np.ndarray:
        """(N, C): the mean over seeds."""
        return defined_mean(self.values, axis=0)

    def case_scores(self) -> np.ndarray:
        """(N,): a case's mean over organs, averaged over seeds."""
        return defined_mean(defined_mean(self.values, axis=2), axis=0)

    def organ_means(self) -> np.ndarray:
        """(C,): mean over seeds of the mean over cases."""
        return defined_mean(defined_mean(self.values, axis=1), axis=0)

    def over_seeds(self, kind: str) -> tuple[float, float | None]:
        """Mean and sample SD over seeds of the "class" or "case" mean; no SD for one seed."""
        inner = {"class": 1, "case": 2}[kind]
        means = defined_mean(defined_mean(self.values, axis=inner), axis=1)
        return float(defined_mean(means)), spread(means)[0]


def gather(by_seed, protocol: str, metric: str) -> Scores | None:
    """The scores of {seed: rows of `cases.csv`} in the cases and organs that all seeds share.

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
    return Scores(tuple(by_seed), cases, organs, np.stack(values))


def shared(lists, key: str) -> tuple[str, ...]:
    """What every list of rows has under `key` ("case" or "class"), in the first one's order."""
    found = [dict.fromkeys(row[key] for row in rows) for rows in lists]
    return tuple(name for name in found[0] if all(name in other for other in found))
