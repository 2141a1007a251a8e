"""Paired statistics over cases: by hand, against scipy, and Holm against its definition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.aggregate import gather, spread
from pgpsam_jax.metrics.summary import summarize
from pgpsam_jax.results.tables.statistics import (
    APPROXIMATE,
    EXACT,
    compare,
    comparison_notes,
    data_notes,
    group_notes,
    holm,
    sample_notes,
    signed_rank,
    smallest_p,
)
from tests.support.grid_folder import case_rows

# Two seeds of a row; in seed 1 case b has no spleen in truth and prediction.
ROW = {
    0: case_rows({"a": (0.8, 0.6), "b": (0.9, 0.5), "c": (0.7, 0.0)}),
    1: case_rows({"a": (0.6, 0.6), "b": (0.7, None), "c": (0.9, 0.4)}),
}


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=14),
    st.integers(0, 2**32 - 1),
)
def test_cases_of_one_group_count_as_one(groups, seed):
    """Comparison and interval over groups are those of cases that have the groups' means."""
    rng = np.random.default_rng(seed)
    dice = rng.uniform(0, 1, (2, len(groups), 2))
    names = [f"case{i}" for i in range(len(groups))]
    of_case = {name: f"person{group}" for name, group in zip(names, groups, strict=True)}
    rows = [{0: case_rows(dict(zip(names, values.tolist(), strict=True)))} for values in dice]
    grouped = [gather(by_seed, "strict", "dice", of_case) for by_seed in rows]
    means = [
        {
            person: np.mean(
                [values[i] for i, name in enumerate(names) if of_case[name] == person], axis=0
            ).tolist()
            for person in dict.fromkeys(of_case.values())
        }
        for values in dice
    ]
    alone = [gather({0: case_rows(by_person)}, "strict", "dice") for by_person in means]
    np.testing.assert_allclose(grouped[0].unit_scores(), alone[0].case_scores(), atol=1e-12)
    ours, theirs = compare(*grouped), compare(*alone)
    assert ours.n == theirs.n == len(set(groups))
    assert (ours.better, ours.worse) == (theirs.better, theirs.worse)
    assert ours.p == pytest.approx(theirs.p) and ours.row == pytest.approx(theirs.row)
    if ours.n > 1:
        assert ours.interval == pytest.approx(theirs.interval, abs=1e-9)
    summary, of_means = summarize(rows[0][0], groups=of_case), summarize(case_rows(means[0]))
    assert summary["n_groups"] == ours.n and summary["n_cases"] == len(names)
    for ends, wanted in (
        (summary["strict"], of_means["strict"]),
        *zip(*(s["strict"]["per_class"].values() for s in (summary, of_means)), strict=True),
    ):
        key = next(key for key in ends if key in ("dice_case_ci95", "dice_ci95"))
        assert ends[key] == (None if ours.n == 1 else pytest.approx(wanted[key], abs=1e-9))


def test_groups_of_one_change_nothing():
    plain, single = (gather(ROW, "strict", "dice", g) for g in (None, {"a": "x", "b": "y"}))
    np.testing.assert_array_equal(plain.case_scores(), single.unit_scores())
    assert group_notes([plain]) == []
    assert group_notes([plain, gather(ROW, "strict", "dice", {"a": "x", "b": "x"})]) == [
        "Cases of one group, such as a person, are averaged first: intervals and tests are over 2 "
        "groups, which n counts."
    ]


def test_scores_by_hand():
    scores = gather(ROW, "strict", "dice")
    assert (scores.seeds, scores.cases) == ((0, 1), ("a", "b", "c"))
    assert scores.organs == ("liver", "spleen")
    np.testing.assert_allclose(scores.per_case(), [[0.7, 0.6], [0.8, 0.5], [0.8, 0.2]])
    # Case means: seed 0 (0.7, 0.7, 0.35), seed 1 (0.6, 0.7, 0.65).
    np.testing.assert_allclose(scores.case_scores(), [0.65, 0.7, 0.5])
    # Organ means: liver 0.8 and 2.2 / 3; spleen 1.1 / 3 and 0.5.
    np.testing.assert_allclose(scores.organ_means(), [(0.8 + 2.2 / 3) / 2, (1.1 / 3 + 0.5) / 2])
    class_means = (0.8 + 1.1 / 3) / 2, (2.2 / 3 + 0.5) / 2
    mean, sd = scores.over_seeds("class")
    assert mean == pytest.approx(np.mean(class_means))
    assert sd == pytest.approx(abs(class_means[0] - class_means[1]) / math.sqrt(2))
    assert scores.over_seeds("case") == pytest.approx(
        ((1.75 + 1.95) / 6, np.std([1.75 / 3, 1.95 / 3], ddof=1))
    )
    one = gather({0: ROW[0]}, "strict", "dice")
    assert one.over_seeds("class") == (pytest.approx(class_means[0]), None)


@pytest.mark.parametrize("protocol, metric", [("strict", "hd95"), ("transunet", "dice")])
def test_scores_agree_with_the_summary_of_each_seed(protocol, metric):
    summaries = [summarize(rows)[protocol] for rows in ROW.values()]
    scores = gather(ROW, protocol, metric)
    for kind in ("class", "case"):
        means = [summary[f"{metric}_{kind}_mean"] for summary in summaries]
        assert scores.over_seeds(kind) == pytest.approx((np.mean(means), np.std(means, ddof=1)))


def test_only_shared_cases_and_organs_are_used_and_that_is_said():
    other = case_rows({"b": (0.5, 0.3), "c": (0.5, 0.3), "d": (0.1, 0.1)}, ("liver", "aorta"))
    scores = gather({0: ROW[0], 5: other, 6: []}, "strict", "dice")
    assert (scores.seeds, scores.cases, scores.organs) == ((0, 5), ("b", "c"), ("liver",))
    np.testing.assert_allclose(scores.values[:, :, 0], [[0.9, 0.7], [0.5, 0.5]])
    notes = data_notes({"full": {0: ROW[0], 5: other}})
    assert len(notes) == 2 and "different cases; only the 2 shared by all" in notes[0]
    assert "seeds of full were scored on different organs; only the 1" in notes[1]
    notes = data_notes({"x": {0: ROW[0]}, "y": {0: other}})
    assert "rows were scored on different cases (x: 3, y: 3)" in notes[0]
    assert gather({3: []}, "strict", "dice") is None
    apart = gather({0: ROW[0], 1: case_rows({"z": (0.5, 0.5)})}, "strict", "dice")
    assert apart.cases == () and math.isnan(apart.over_seeds("case")[0])
    assert np.isnan(apart.organ_means()).all()


def test_another_reference_mask_of_the_same_case_is_noticed():
    dice = {"a": (0.8, 0.6), "b": (0.9, 0.5)}
    same, other = case_rows(dice), case_rows(dice, truth={"b": 1001})
    assert data_notes({"x": {0: same}, "y": {0: same}}) == []
    for lines in ({"x": {0: same, 1: other}}, {"x": {0: same}, "y": {0: other}}):
        (note,) = data_notes(lines)
        assert "reference masks of 1 case(s) (b) differ" in note


def test_a_case_twice_is_refused():
    with pytest.raises(UserError, match="case a was evaluated twice"):
        gather({0: ROW[0] + ROW[0][:5]}, "strict", "dice")


def test_comparison_by_hand():
    reference = {
        1: case_rows({"c": (0.5, 0.1), "b": (0.7, 0.1), "a": (0.6, 0.5), "e": (0.1, 0.1)}),
        2: case_rows({"c": (0.1, 0.1), "b": (0.1, 0.1), "a": (0.1, 0.1), "e": (0.1, 0.1)}),
    }
    row, other = (gather(by_seed, "strict", "dice") for by_seed in (ROW, reference))
    one = compare(row, other)
    # Seed 1 only: a 0.6 - 0.55, b 0.7 (liver alone) - 0.4, c 0.65 - 0.3.
    assert (one.seeds, one.n, one.better, one.worse, one.same) == ((1,), 3, 3, 0, 0)
    assert one.row == pytest.approx(1.95 / 3) and one.reference == pytest.approx(1.25 / 3)
    assert one.difference == pytest.approx(0.7 / 3)
    assert one.p == pytest.approx(0.25) and one.method == EXACT
    differences = [0.05, 0.3, 0.35]
    half = 4.30265273 * np.std(differences, ddof=1) / math.sqrt(3)  # t of 2 degrees, from a table
    assert one.interval == pytest.approx([0.7 / 3 - half, 0.7 / 3 + half])
    spleen = compare(row, other, "spleen")  # b is undefined in the row
    assert (spleen.n, spleen.better) == (2, 2)
    assert spleen.difference == pytest.approx((0.1 + 0.3) / 2)
    liver = compare(row, other, "liver")
    assert (liver.n, liver.better, liver.same, liver.p) == (3, 1, 2, 1.0)
    assert compare(row, None) is None and compare(None, other) is None
    assert compare(row, other, "aorta") is None
    assert compare(gather({0: ROW[0]}, "strict", "dice"), other) is None  # no seed in common


def exact_p(differences):
    """Two-sided signed-rank p by going through all signs of the midranks."""
    differences = [d for d in differences if d != 0]
    ranks = stats.rankdata(np.abs(differences))
    observed = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0)
    sums = [np.dot(ranks, s) for s in itertools.product((0, 1), repeat=len(ranks))]
    low, high = np.mean(np.array(sums) <= observed), np.mean(np.array(sums) >= observed)
    return min(1.0, 2 * min(low, high))


def test_signed_rank_is_exact_where_it_says_so():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 12):
        for _ in range(3):
            clear = rng.normal(0.3, 1, n)
            tied = rng.integers(-3, 4, n).astype(float)
            for differences in (clear, tied):
                p, method = signed_rank(differences)
                assert method == EXACT and p == pytest.approx(exact_p(differences), abs=1e-12)
    for n in (30, 50):
        many = rng.normal(0.2, 1, n)
        wanted = stats.wilcoxon(many, method="exact").pvalue
        assert signed_rank(many) == (pytest.approx(wanted, rel=1e-12), EXACT)
    tied = np.round(rng.normal(0.2, 1, 60), 1)
    p, method = signed_rank(tied)
    assert method == APPROXIMATE
    assert p == pytest.approx(stats.wilcoxon(tied[tied != 0], method="asymptotic").pvalue)
    assert signed_rank(rng.normal(size=51))[1] == APPROXIMATE


def test_zero_differences_are_dropped():
    clear = np.array([0.3, -0.1, 0.5, 0.7, 0.2])
    assert signed_rank([*clear, 0, 0, 0]) == signed_rank(clear)
    many = np.random.default_rng(1).normal(0.2, 1, 20)
    assert signed_rank([*many, 0, 0]) == signed_rank(many) and signed_rank(many)[1] == EXACT
    assert signed_rank([0.0, 0.0]) == (1.0, EXACT) and signed_rank([]) == (1.0, EXACT)


def test_smallest_p_is_what_the_test_gives_at_best():
    for n in range(1, 13):
        best, _ = signed_rank(np.arange(1, n + 1))
        assert best == pytest.approx(smallest_p(n)) and best == pytest.approx(2.0 ** (1 - n))
    assert smallest_p(5) == 0.0625 and smallest_p(0) == 1.0
    assert smallest_p(12) == pytest.approx(0.000488, abs=1e-6)


def naive_holm(p_values):
    """Adjusted p = the smallest level at which the step-down procedure still rejects."""
    adjusted = []
    for p in p_values:
        order = sorted(p_values)
        steps = [min(1.0, (len(order) - j) * q) for j, q in enumerate(order) if q <= p]
        adjusted.append(max(steps))
    return adjusted


def rejected(p_values, level):
    """Holm's procedure as it is told: the smallest at level/m, the next at level/(m - 1), ..."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found = set()
    for rank, place in enumerate(order):
        if p_values[place] * (len(order) - rank) > level:
            break
        found.add(place)
    return found


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_properties(p_values):
    adjusted = holm(p_values)
    assert adjusted == pytest.approx(naive_holm(p_values))
    assert all(p <= new <= 1 for p, new in zip(p_values, adjusted, strict=True))
    ordered = [new for _, new in sorted(zip(p_values, adjusted, strict=True))]
    assert ordered == sorted(ordered)
    assert {i for i, p in enumerate(adjusted) if p <= 0.05} == rejected(p_values, 0.05)


def test_holm_by_hand_and_without_the_undefined():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    found = holm([0.04, math.nan, 0.01])
    assert found[::2] == pytest.approx([0.04, 0.02]) and math.isnan(found[1])
    assert holm([]) == []


def test_interval_covers_as_often_as_it_says():
    """Normal scores, n = 12: 95 % of 4000 intervals hold the mean, within 3.3 standard errors."""
    draws = np.random.default_rng(3).normal(0.8, 0.05, (4000, 12))
    ends = np.array([spread(draw)[1] for draw in draws])
    covered = np.mean((ends[:, 0] <= 0.8) & (0.8 <= ends[:, 1]))
    assert abs(covered - 0.95) < 3.3 * math.sqrt(0.95 * 0.05 / 4000)
    assert spread([0.5]) == (None, None) == spread([math.nan, 0.5])


def pair(n, same=0):
    """A comparison of n cases, `same` of them without a difference."""
    row = {f"{i}": (0.5 + (0 if i < same else 0.01 * (i + 1)),) for i in range(n)}
    reference = {case: (0.5,) for case in row}
    scores = [gather({0: case_rows(d, ("liver",))}, "strict", "dice") for d in (row, reference)]
    return compare(*scores)


def test_notes_on_what_the_test_can_reach():
    text = " ".join(comparison_notes([pair(12), pair(12)]))
    assert "exact (2); 0 zero difference(s)" in text and "for the 2 comparison(s)" in text
    assert "Warning" not in text
    text = " ".join(comparison_notes([pair(12), pair(12, same=8)]))
    assert "8 zero difference(s) dropped" in text
    assert "1 of 2 comparison(s) have too few" in text and "(with 4, the smallest" in text
    assert "is 0.125)" in text and "no Holm p" not in text
    text = " ".join(comparison_notes([pair(6)] * 2))  # 2 x 0.03125
    assert "no Holm p can be below 0.0625" in text and "too few" not in text
    assert comparison_notes([]) == []


def test_notes_on_few_cases_and_seeds():
    assert sample_notes([50, 60], [3, 5]) == [] == sample_notes([], [])
    cases, seeds = sample_notes([12, 10], [3, 1])
    assert "n = 10 to 12 cases. n < 50" in cases and "one seed have no SD" in seeds
    assert "fewer than 3 seeds" in sample_notes([60], [3, 2])[0]


def test_seeds_that_disagree_are_warned_about():
    """A tiny lead in every case on average, made by one seed of three."""
    names = [f"{number:02d}" for number in range(12)]
    row = {0: 0.70, 1: 0.70, 2: 0.80}
    made = [
        {seed: case_rows({name: (level, level) for name in names}) for seed, level in each.items()}
        for each in (row, {0: 0.71, 1: 0.71, 2: 0.73})
    ]
    one = compare(*(gather(rows, "strict", "dice") for rows in made))
    assert one.by_seed == pytest.approx((-0.01, -0.01, 0.07))
    assert one.difference == pytest.approx(0.05 / 3) and one.p < 0.05 and one.seeds_disagree
    assert any("change sign between seeds" in note for note in comparison_notes([one]))
    same = compare(*(gather(rows, "strict", "dice") for rows in made[::-1]))
    assert same.seeds_disagree
    agreed = compare(
        gather({0: made[0][2]}, "strict", "dice"), gather({0: made[1][2]}, "strict", "dice")
    )
    assert not agreed.seeds_disagree
    assert not any("change sign" in note for note in comparison_notes([agreed]))
