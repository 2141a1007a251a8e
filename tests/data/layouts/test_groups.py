"""Groups of cases, such as volumes of one person: found, refused, and never in two parts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgpsam_jax import verify
from pgpsam_jax.config import exclusive_fields
from pgpsam_jax.data import dataset
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.groups import read_groups, with_groups
from pgpsam_jax.data.layouts.split import split_cases
from pgpsam_jax.errors import UserError
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for, write_data

REGEX = "(patient[0-9]+)_"


def cases_of(ids):
    return [Case(i, f"{i}.nii", f"{i}-seg.nii") for i in ids]


def groups_of(cases, **source):
    return {case.case_id: case.group for case in with_groups(cases, **source)}


def persons(parts):
    return [{case.group for case in part} for part in parts]


@given(
    st.lists(st.integers(1, 4), min_size=3, max_size=15),
    st.floats(0.05, 0.6),
    st.floats(0, 0.3),
    st.integers(0, 99),
)
def test_a_group_is_never_in_two_parts(sizes, test, held_out, seed):
    ids = [f"patient{p}_{scan}" for p, size in enumerate(sizes) for scan in range(size)]
    cases = with_groups(cases_of(ids), REGEX)
    options = {"test_fraction": test, "validation_fraction": held_out, "seed": seed}
    wanted = [
        max(round(held_out * len(sizes)), 1) if held_out else 0,
        max(round(test * len(sizes)), 1),
    ]
    if sum(wanted) >= len(sizes):
        with pytest.raises(UserError, match="groups to train on"):
            split_cases(cases, "group", **options)
        return
    parts = split_cases(cases, "group", **options)
    assert sorted(case.case_id for part in parts for case in part) == sorted(ids)
    train, validation, tests = persons(parts)
    assert not (train & validation or train & tests or validation & tests)
    assert [len(validation), len(tests)] == wanted and train
    assert split_cases(cases[::-1], "group", **options) == parts
    without = split_cases(cases, "group", test_fraction=test, seed=seed)
    assert without[2] == parts[2]  # validation does not change the test persons


def test_one_case_per_group_is_the_split_by_case():
    """The same draw, so that a set in which no person comes twice needs no other numbers."""
    ids = [f"patient{i:02d}_a" for i in range(20)]
    options = {"test_fraction": 0.3, "validation_fraction": 0.2, "seed": 5}
    grouped = split_cases(with_groups(cases_of(ids), REGEX), "group", **options)
    single = split_cases(cases_of(ids), "fraction", **options)
    assert [[c.case_id for c in part] for part in grouped] == [
        [c.case_id for c in part] for part in single
    ]


def test_other_splits_may_not_tear_a_group(tmp_path):
    cases = with_groups(cases_of(["patient1_a", "patient1_b", "patient2_a"]), REGEX)
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["patient1_a", "patient2_a"], "test": ["patient1_b"]}))
    with pytest.raises(UserError, match=r"group patient1 in train .* and in test .*leaks"):
        split_cases(cases, "file", file=file)
    assert split_cases(cases, "within_volume")[0] == cases
    with pytest.raises(UserError, match=r"give data\.group, a regular expression"):
        split_cases(cases_of("abc"), "group", test_fraction=0.5)
    with pytest.raises(UserError, match=r"at least 2 groups, got 0\.5 and 1"):
        split_cases(cases[:2], "group", test_fraction=0.5)


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("patient([0-9]+", "is no regular expression"),
        ("patient[0-9]+", "has 0 capture groups"),
        ("(patient)([0-9]+)", "has 2 capture groups"),
        ("(patient[0-9]+)_b", r"does not match the case\(s\) patient1_a, patient2_a; correct it"),
        ("patient1_a|patient1_b|([0-9])_a", r"does not match the case\(s\) patient1_a, patient1_b"),
    ],
)
def test_expressions_that_name_no_groups(pattern, said):
    with pytest.raises(UserError, match=said):
        with_groups(cases_of(["patient1_a", "patient1_b", "patient2_a"]), pattern)


@pytest.mark.parametrize(
    "name, content",
    [
        ("g.json", '{"1": "anna", "patient 2": 7}'),
        ("g.csv", "case,group\n1,anna\npatient 2,7\n"),
        ("G.CSV", "\ufeffcase, group\r\n0001 , anna\r\n\r\npatient_2,7\r\n"),
    ],
)
def test_files_of_groups(tmp_path, name, content):
    """Cases are named as in split files, by id or by file name."""
    file = tmp_path / name
    file.write_text(content, newline="")
    assert groups_of(cases_of(["001", "patient_2"]), file=file) == {"001": "anna", "patient_2": "7"}
    with pytest.raises(UserError, match=rf"{name} does not name the case\(s\) 3, x; add them"):
        with_groups(cases_of(["001", "3", "x"]), file=file)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("g.json", "[1]", r'must be \{"CASE": "GROUP"'),
        ("g.json", '{"a": ""}', "must be"),
        ("g.json", '{"a": null}', "must be"),
        ("g.json", '{"a": true}', "must be"),
        ("g.json", "{", "cannot be read as JSON"),
        ("g.json", '{"01": "x", "1": "y"}', "puts case 1 into the groups x and y"),
        ("g.csv", "a,1\n", "must start with the line case,group"),
        ("g.csv", "", "must start with"),
        ("g.csv", "case,group\na\n", "has the line 'a'"),
        ("g.csv", "case,group\na,\n", "has the line 'a,'"),
        ("g.csv", "case,group\na,1\na,2\n", "puts case a into the groups 1 and 2"),
    ],
)
def test_files_that_name_no_groups(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as told:
        read_groups(tmp_path / name)
    assert str(tmp_path / name) in str(told.value)


def test_a_configuration_with_groups(tmp_path):
    ids = ("p1_l", "p1_r", "p2_l", "p2_r", "p3_l")
    root = write_data(tmp_path, ids)
    settings = {"data__split": "group", "data__split_file": "", "data__test_fraction": 0.34}
    config = config_for(root, **settings, data__group="^(p[0-9])")
    exclusive_fields.check_run_settings(config)
    split = dataset.find_split(config.data)
    train, _, test = persons(split[:3])
    assert len(train) == 2 and len(test) == 1 and not train & test
    (root / "groups.json").write_text(json.dumps({i: i[:2] for i in ids}))
    with exclusive_fields.set_by("the command line"):
        config.data.group_file = str(root / "groups.json")
    assert config.data.group == "" and dataset.find_split(config.data)[:3] == split[:3]
    config.data.group, config.data.group_file = "(.)", str(root / "groups.json")
    with pytest.raises(UserError, match="exclude each other"):
        exclusive_fields.check_run_settings(config)


def test_verify_tells_of_a_torn_group(tmp_path):
    root = write_data(tmp_path, ("p1_l", "p1_r", "p2_l"))  # of which the last is for testing
    globs = {"image_glob": "images/*.nii.gz", "label_glob": "labels/*.nii.gz"}
    options = {"split": "file", "split_file": root / "split.json", "say": lambda line: None}

    def told(group):
        report = verify.verify(root, **globs, **options, group=group)
        return [f["message"] for f in report["data_set"] if f["code"] == "split"]

    assert told("^(p[0-9])") == []
    assert "group l in train" in told("_(.)$")[0]
    assert "does not match" in told("^(x)")[0]


def test_the_persons_of_the_hippocampus_set():
    """Two consecutive numbers are one person, the odd one first (configs/hippocampus.py)."""
    groups = read_groups(REPOSITORY / "configs" / "labels" / "hippocampus_persons.csv")
    assert len(groups) == 394
    assert all(
        int(group) == (int(case.removeprefix("hippocampus_")) + 1) // 2
        for case, group in groups.items()
    )
