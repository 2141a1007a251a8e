"""Splits: folds are a partition that keeps groups whole, `all` tests nothing."""

from pathlib import Path

import pytest

from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.split import split_cases
from pgpsam_jax.errors import UserError


def cases_of(groups):
    """One case per letter, of that group; `.` has none."""
    return [
        Case(f"case{i:02d}", Path(f"{i}.nii.gz"), Path(f"{i}_label.nii.gz"), group=group.strip("."))
        for i, group in enumerate(groups)
    ]


def ids(cases):
    return {case.case_id for case in cases}


@pytest.mark.parametrize("groups", ["." * 11, "aabbccddeef", "aab..cdd..e"])
@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_every_case_is_tested_once_and_no_group_is_in_two_parts(groups, folds, validation):
    cases = cases_of(groups)
    options = dict(folds=folds, validation_fraction=validation, seed=3)
    parts = [split_cases(cases, "folds", fold=i, **options) for i in range(folds)]
    tested = [case.case_id for _, _, test in parts for case in test]
    assert sorted(tested) == sorted(ids(cases))
    for part in parts:
        assert [ids(p) for p in part] == [
            ids(p) for p in split_cases(cases[::-1], "folds", fold=parts.index(part), **options)
        ]
        assert sum(map(len, part)) == len(cases) and part[0] and bool(part[1]) == bool(validation)
        of_part = [{case.group for case in p if case.group} for p in part]
        assert not (of_part[0] & of_part[1] | of_part[0] & of_part[2] | of_part[1] & of_part[2])
    sizes = [len({c.group or c.case_id for c in test}) for _, _, test in parts]
    assert max(sizes) - min(sizes) <= 1
    others = [split_cases(cases, "folds", folds=folds, seed=seed)[2] for seed in range(9)]
    assert any(ids(test) != ids(parts[0][2]) for test in others)


def test_all_trains_on_everything_that_is_not_kept_for_testing_by_the_layout():
    cases = cases_of("....")
    assert split_cases(cases, "all") == (cases, [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "data.folds is 1; choose from 2 to 3"),
        ({"folds": 4}, "data.folds is 4; choose from 2 to 3"),
        ({"folds": 3, "fold": 3}, "data.fold is 3; the 3 folds are numbered from 0"),
        ({"folds": 3, "fold": -1}, "data.fold is -1"),
        ({"folds": 2, "validation_fraction": 0.7}, "leave one of the 3 cases or groups to train"),
    ],
)
def test_folds_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        split_cases(cases_of("aabbc"), "folds", **options)


def test_validation_cases_are_for_splits_that_draw():
    with pytest.raises(UserError, match="which split 'all' does not use"):
        split_cases(cases_of("..."), "all", validation_fraction=0.2)
