"""Paired comparisons of the rows of a table over test cases or groups of them, with warnings.

The test is over cases, not seeds: five seeds cannot reach p < 0.05 in a two-sided signed-rank test,
twelve cases can. Its p-value therefore generalizes to other cases for the trained models; variation
from retraining shows in the SD over seeds.
"""

import dataclasses

import numpy as np
from scipy import stats

from pgpsam_jax.metrics.aggregate import (
    SMALL,
    SMALL_SAMPLE,
    Scores,
    defined_mean,
    grouped_note,
    spread,
    unit_means,
)

LEVEL = 0.05
EXACT, APPROXIMATE = "exact", "normal approximation"
DIFFERENCE_INTERVAL = (
    "two-sided 95 % Student t interval of the mean of the paired differences (n cases)"
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Row minus reference over the n cases in which both are defined, or their groups if known.

    Scores are in the unit of the rows (Dice 0..1). interval: 95 % CI of the mean difference, None
    for n < 2. better, worse, same: numbers of these; the test drops ties. by_seed: the mean
    difference per seed.
    """

    seeds: tuple[int, ...]
    n: int
    row: float
    reference: float
    difference: float
    interval: list[float] | None
    p: float
    method: str
    better: int
    worse: int
    same: int
    by_seed: tuple[float, ...]

    @property
    def seeds_disagree(self) -> bool:
        """Whether the sign of the difference depends on the seed."""
        return min(self.by_seed) < 0 < max(self.by_seed)


def compare(row: Scores | None, reference: Scores | None, organ=None) -> Comparison | None:
    """Compares one organ or, by default, the mean over organs of each case.

    Uses the seeds, cases and organs that both share, averaged over seeds. None if they share none.
    """
    if row is None or reference is None:
        return None
    if organ is not None:
        row = row.select(row.seeds, row.cases, [name for name in row.organs if name == organ])
    both = row.common_with(reference)
    pairs = np.stack([scores.case_scores() for scores in both])
    each = np.stack([defined_mean(scores.values, axis=2) for scores in both])
    by_seed = defined_mean(each[0] - each[1], axis=1).tolist()
    defined = np.isfinite(pairs).all(axis=0)
    if not defined.any():
        return None
    units = [unit for unit, kept in zip(both[0].units, defined, strict=True) if kept]
    pairs = unit_means(pairs[:, defined], units)
    differences = pairs[0] - pairs[1]
    p, method = signed_rank(differences)
    better, worse, same = (int((np.sign(differences) == sign).sum()) for sign in (1, -1, 0))
    ours, theirs = pairs.mean(axis=1).tolist()
    means = ours, theirs, float(differences.mean())
    interval = spread(differences)[1]
    counts = both[0].seeds, pairs.shape[1]
    return Comparison(*counts, *means, interval, p, method, better, worse, same, tuple(by_seed))


def signed_rank(differences) -> tuple[float, str]:
    """Two-sided p of Wilcoxon's signed-rank test, and its method.

    Zero differences are dropped (Wilcoxon's rule), ties share a rank; p is 1 if none is left. Exact
    up to 50 differences, normal approximation beyond.
    """
    differences = np.asarray(differences, float)
    differences = differences[differences != 0]
    if differences.size == 0:
        return 1.0, EXACT
    if differences.size > 50:
        return float(stats.wilcoxon(differences, method="asymptotic").pvalue), APPROXIMATE
    # Distribution of the rank sum by convolution; ranks are doubled to make shared ones integers.
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
    chance = np.ones(1)
    for rank in ranks:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    positive = ranks[differences > 0].sum()
    tail = min(chance[: positive + 1].sum(), chance[positive:].sum())
    return min(1.0, 2 * float(tail)), EXACT


def smallest_p(n: int) -> float:
    """The smallest two-sided p for n untied differences: all of one sign."""
    return min(1.0, 2.0 ** (1 - n))


def holm(p_values) -> list[float]:
    """Holm's step-down adjustment of a family of p-values; NaNs are not members.

    The i-th smallest of m (i = 0..m-1) becomes the maximum of (m - j) p_(j) over j <= i, at most 1.
    Rejecting values <= 0.05 bounds the family-wise error rate at 5 %.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]  # NaNs sort last
    adjusted = np.full(len(p), np.nan)
    steps = np.arange(len(order), 0, -1) * p[order]
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted.tolist()


def comparison_notes(comparisons) -> list[str]:
    """Notes on the method of a family of p-values, with warnings if n is too small.

    comparisons: of one table, without None.
    """
    if not comparisons:
        return []
    m, dropped = len(comparisons), sum(one.same for one in comparisons)
    methods = {
        method: sum(one.method == method for one in comparisons) for method in (EXACT, APPROXIMATE)
    }
    how = ", ".join(f"{method} ({count})" for method, count in methods.items() if count)
    notes = [
        f"p: two-sided Wilcoxon signed-rank test over cases, {how}; {dropped} zero difference(s) "
        f"dropped. Holm p: corrected for the {m} comparison(s) in this table that have results.",
        "p and CI generalize to other cases for these trained models; they do not cover retraining "
        "(see the SD over seeds).",
    ]
    unstable = sum(one.seeds_disagree for one in comparisons if one.p <= LEVEL)
    if unstable:
        notes.append(
            f"Warning: {unstable} comparison(s) with p <= {LEVEL} change sign between seeds: they "
            "are no evidence that the row would be better or worse after retraining."
        )
    pairs = [one.n - one.same for one in comparisons]
    if short := [used for used in pairs if smallest_p(used) > LEVEL]:
        notes.append(
            f"Warning: {len(short)} of {m} comparison(s) have too few differing pairs for the test "
            f"to reach {LEVEL} at any effect size (with {max(short)}, the smallest possible p is "
            f"{smallest_p(max(short)):.3g})."
        )
    if m * smallest_p(max(pairs)) > LEVEL:
        notes.append(
            f"Warning: with {max(pairs)} differing pairs and {m} comparison(s), no Holm p can be "
            f"below {min(1, m * smallest_p(max(pairs))):.3g}, so none can reach {LEVEL}."
        )
    return notes


def group_notes(found) -> list[str]:
    """The sentence on groups of cases, if any scores have them; found: `Scores` of the rows."""
    counts = [len(set(scores.units)) for scores in found if scores.groups]
    return [f"{grouped_note(_range(counts))}, which n counts."] if counts else []


def sample_notes(n_cases, n_seeds) -> list[str]:
    """Warnings about few cases or seeds. n_cases, n_seeds: one count per row with results."""
    notes = []
    if n_cases and min(n_cases) < SMALL:
        notes.append(f"Warning: n = {_range(n_cases)} cases. {SMALL_SAMPLE}.")
    if n_seeds and min(n_seeds) == 1:
        notes.append(
            "Warning: rows with one seed have no SD over seeds; their differences may be due to "
            "the seed."
        )
    elif n_seeds and min(n_seeds) < 3:
        notes.append("Warning: fewer than 3 seeds; the SD over seeds is itself very uncertain.")
    return notes


def data_notes(lines) -> list[str]:
    """Warnings if runs were not scored on the same cases, organs or reference masks.

    lines: {row label: {seed: rows of cases.csv}} of the rows with results.
    """
    notes, kept = [], {}
    for label, by_seed in lines.items():
        for key, what in (("case", "cases"), ("class", "organs")):
            names = {seed: {row[key] for row in rows} for seed, rows in by_seed.items()}
            common, union = set.intersection(*names.values()), set.union(*names.values())
            kept[label, key] = common
            if common != union:
                notes.append(
                    f"Warning: the seeds of {label} were scored on different {what}; only the "
                    f"{len(common)} shared by all are used (of {len(union)})."
                )
    for key, what in (("case", "cases"), ("class", "organs")):
        sets = {label: kept[label, key] for label in lines}
        if len({frozenset(names) for names in sets.values()}) > 1:
            counts = ", ".join(f"{label}: {len(names)}" for label, names in sets.items())
            notes.append(
                f"Warning: rows were scored on different {what} ({counts}); each row's means use "
                f"its own {what}, comparisons the shared ones."
            )
    return notes + _mask_notes(lines)


def _mask_notes(lines) -> list[str]:
    """Warning if the voxel counts of reference masks of the same case differ between runs."""
    masks: dict = {}
    for by_seed in lines.values():
        for rows in by_seed.values():
            for row in rows:
                key = row["protocol"], row["case"], row["class"]
                masks.setdefault(key, set()).add(row["truth_voxels"])
    differing = sorted({case for (_, case, _), counts in masks.items() if len(counts) > 1})
    if not differing:
        return []
    return [
        f"Warning: the reference masks of {len(differing)} case(s) ({', '.join(differing[:3])}"
        f"{', ...' if len(differing) > 3 else ''}) differ between runs (other data or "
        "other scored slices): these runs were not scored on the same test set."
    ]


def _range(counts) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
