"""Few-shot lists: rules against plain transcriptions, determinism, and the file format."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpsam_jax.data.fewshot_list import FewShotList, make_list, read_list
from pgpsam_jax.errors import UserError

NAMES = ("background", "a", "b", "c")


def volumes(cases=5, depth=30, organs=3, seed=0):
    """Organs as smooth bumps over the slices; the ends of a volume hold none."""
    rng = np.random.default_rng(seed)
    z = np.arange(depth)[:, None]
    result = {}
    for case in range(cases):
        center, width = rng.uniform(8, depth - 8, organs), rng.uniform(2, 6, organs)
        area = np.maximum(0, 900 * (1 - ((z - center) / width) ** 2)).astype(int)
        result[f"{case + 1:04d}"] = np.concatenate([10**5 - area.sum(1, keepdims=True), area], 1)
    return result


AREAS = volumes()
VALID = [(c, i) for c, a in AREAS.items() for i in range(len(a)) if a[i, 1:].max() >= 100]


def release_rule(areas, scale, classes, seed=42):
    """The authors' script of docs/release_code.md#few-shot-list, over sorted mask names."""
    masks = sorted(f"case{c}_slice{i:03d}" for c, i in VALID if c in areas)
    total = len(masks)
    target = int(np.floor(total * scale)) + 1
    generator = random.Random(seed)
    union = []
    for organ in range(1, classes):
        found = []
        for mask in masks:
            area = areas[mask[4:8]][int(mask[-3:]), organ]
            if area > 0:
                found.append((mask, area))
        found = sorted(found, key=lambda item: item[1], reverse=True)
        for mask, _ in found[: total // (classes - 1)]:
            if mask not in union:
                union.append(mask)
    if len(union) > target:
        union = generator.sample(union, target)
    elif len(union) < target:
        rest = [mask for mask in masks if mask not in union]
        union = union + generator.sample(rest, target - len(union))
    return sorted((mask[4:8], int(mask[-3:])) for mask in union)


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.1, 0.3, 0.7, 0.95])
def test_area_is_the_release_rule(scale):
    """Both branches: thinned below 0.7 or so, topped up above."""
    made = make_list(AREAS, "area", fraction=scale)
    assert list(made.entries) == release_rule(AREAS, scale, 4)
    assert made.rule["seed"] == 42 and len(made) == int(len(VALID) * scale) + 1
    assert make_list(AREAS, "area", fraction=scale, seed=43) != made or scale > 0.9


@given(st.integers(0, 50), st.integers(1, 4), st.floats(0.02, 0.98))
@settings(max_examples=40, deadline=None)
def test_area_lists_are_rich_in_organs(seed, cases, scale):
    areas = volumes(cases, seed=seed)
    made = make_list(areas, "area", fraction=scale, pool="all")
    assert len(made) == min(int(cases * 30 * scale + 1e-9) + 1, cases * 30)
    rich = set()
    for organ in (1, 2, 3):
        flat = [(-areas[c][i, organ], c, i) for c in areas for i in range(30) if areas[c][i, organ]]
        rich |= {(c, i) for _, c, i in sorted(flat)[: cases * 30 // 3]}
    if len(rich) >= len(made):
        assert set(made.entries) <= rich
    else:
        assert rich <= set(made.entries)


def test_random():
    made = make_list(AREAS, "random", fraction=0.1)
    assert len(made) == int(len(VALID) * 0.1 + 0.5) and set(made.entries) <= set(VALID)
    assert make_list(AREAS, "random", fraction=0.1) == made
    assert make_list(dict(reversed(AREAS.items())), "random", fraction=0.1) == made
    other = [make_list(AREAS, "random", fraction=0.1, seed=s).hash for s in range(6)]
    assert other[0] == made.hash and len(set(other)) == 6
    assert len(make_list(AREAS, "random", count=7, pool="all")) == 7
    everything = make_list(AREAS, "random", fraction=1.0, pool="all")
    assert everything.entries == make_list(AREAS, "all", pool="all").entries
    assert len(make_list({"x": np.full((2211, 2), 500)}, "random", fraction=0.1)) == 221


def test_random_is_pinned():
    """The published lists depend on this draw; a change of it must not go unnoticed."""
    made = make_list({"p": np.full((10, 2), 500)}, "random", count=4, seed=7)
    expected = random.Random(7).sample([("p", i) for i in range(10)], 4)
    assert made.entries == tuple(sorted(expected)) == (("p", 2), ("p", 5), ("p", 6), ("p", 9))


def test_pool():
    assert make_list(AREAS, "all").entries == tuple(VALID)
    assert len(make_list(AREAS, "all", pool="all")) == 150
    loose = make_list(AREAS, "all", min_pixels=1)
    assert set(loose.entries) == {
        (c, i) for c, a in AREAS.items() for i in np.flatnonzero(a[:, 1:].any(1))
    }
    with pytest.raises(UserError, match="lower min_pixels"):
        make_list(AREAS, "all", min_pixels=10**6)


def test_volumes_of_one_group_are_the_last_to_be_drawn():
    cases = sorted(AREAS)
    groups = dict(zip(cases, "aabbc", strict=True))
    for seed in range(20):
        for volumes in (1, 3, 4, 5):
            made = make_list(AREAS, "volumes", volumes=volumes, seed=seed, groups=groups)
            kept = {c for c, _ in made.entries}
            assert len(kept) == volumes
            assert len({groups[c] for c in kept}) == min(volumes, 3)


def test_volumes_and_every():
    made = make_list(AREAS, "volumes", volumes=2)
    cases = {c for c, _ in made.entries}
    assert len(cases) == 2 and made.entries == tuple(e for e in VALID if e[0] in cases)
    drawn = {
        frozenset(c for c, _ in make_list(AREAS, "volumes", volumes=2, seed=s).entries)
        for s in range(9)
    }
    assert len(drawn) > 1
    third = make_list(AREAS, "every", every=3)
    assert third.entries == tuple(e for c in AREAS for e in [v for v in VALID if v[0] == c][::3])


def test_entries_are_plain_numbers_and_described():
    for rule in ({"rule": "area", "count": 9}, {"rule": "every", "every": 4}):
        made = make_list(AREAS, **rule)
        assert all(type(c) is str and type(i) is int for c, i in made.entries)
        assert made.rule.items() >= (rule | {"pool": "valid", "min_pixels": 100}).items()
        assert made.rule["pool_slices"] == len(VALID)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"rule": "best"}, "unknown few-shot rule 'best'; known are random, area"),
        ({"rule": "random"}, "takes one setting, fraction or count; got none"),
        ({"rule": "random", "fraction": 0.1, "count": 3}, "takes one setting"),
        ({"rule": "random", "volumes": 3}, "takes one setting, fraction or count; got"),
        ({"rule": "all", "count": 3}, "takes no size setting"),
        ({"rule": "random", "fraction": 0}, r"must lie in \(0, 1\]"),
        ({"rule": "area", "fraction": 1.5}, r"must lie in \(0, 1\]"),
        ({"rule": "random", "count": 0}, r"count 0 is not in 1\.\."),
        ({"rule": "area", "count": 10**6}, r"count 1000000 is not in 1\.\."),
        ({"rule": "volumes", "volumes": 6}, r"not in 1\.\.5"),
        ({"rule": "every", "every": 0}, "must be 1 or more"),
        ({"rule": "all", "pool": "good"}, 'must be "all" or "valid"'),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(UserError, match=message):
        make_list(AREAS, **setting)


def test_hash_is_of_the_slices_alone():
    entries = (("b", 2), ("a", 10), ("a", 9))
    made = FewShotList(entries, {"rule": "x"})
    assert made.entries == (("a", 9), ("a", 10), ("b", 2))
    assert made.hash == hashlib.sha256(b"a\t9\na\t10\nb\t2\n").hexdigest()
    assert FewShotList(entries[::-1], {"rule": "y"}) == made


def test_file_round_trip(tmp_path):
    path = tmp_path / "lists" / "train.txt"
    made = make_list(AREAS, "random", fraction=0.2, seed=3)
    made.write(path)
    lines = path.read_text().splitlines()
    assert lines[0].startswith('# rule: {"fraction": 0.2, ') and '"seed": 3' in lines[0]
    assert lines[1].startswith(f"# counts: {len(made)} slices, 5 volumes")
    assert lines[2] == f"# hash: {made.hash}"
    assert lines[3] == f"{made.entries[0][0]}\t{made.entries[0][1]}"
    again = read_list(path, AREAS)
    assert again == made and again.rule == made.rule and again.hash == made.hash


@pytest.mark.parametrize(
    "line, message",
    [
        ("0009\t1", "line 2 names case 0009, which is not among"),
        ("0001\t30", "names slice 30 of case 0001, which has 30"),
        ("0001\t-1", "is not `case_id<TAB>slice`"),
        ("0001 1", "is not `case_id<TAB>slice`"),
        ("0001\t1\t2", "is not `case_id<TAB>slice`"),
        ("0001\t٣", "is not `case_id<TAB>slice`"),
        ("../0001\t1", "plain case id"),
        ("..\t1", "plain case id"),
        ("/etc/passwd\t1", "plain case id"),
        ("a\\b\t1", "plain case id"),
        ("0001\t1", "has duplicate slices"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    path = tmp_path / "list.txt"
    path.write_text(f"0001\t1\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        read_list(path, AREAS)
    assert str(path) in str(caught.value)


def test_file_problems(tmp_path):
    path = tmp_path / "list.txt"
    with pytest.raises(UserError, match="cannot be read"):
        read_list(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_list(path)
    path.write_text("# rule: {}\n\n")
    with pytest.raises(UserError, match="holds no slices"):
        read_list(path)
    for rule in ("{", "[1]"):
        path.write_text(f"# rule: {rule}\na\t1\n")
        with pytest.raises(UserError, match="broken rule line"):
            read_list(path)
    path.write_text("0001\t1\n0002\t3\n")  # by hand: no header
    assert read_list(path).rule == {"rule": "file"} and len(read_list(path)) == 2
    make_list(AREAS, "random", count=5).write(path)
    text = path.read_text()
    for changed in (text + "0001\t0\n", "\n".join(text.splitlines()[:-1])):
        path.write_text(changed)
        with pytest.raises(UserError, match="was changed after it was written"):
            read_list(path)


def test_summary():
    areas = {"p": np.array([[9, 1, 0, 0], [9, 4, 4, 0]]), "q": np.array([[9, 0, 0, 0]])}
    text = make_list(areas, "all", min_pixels=1).summary(areas, NAMES)
    assert text == "2 slices of 1 of 2 volumes; with a 2, b 1, c 0"


def test_unseen_slices_are_the_pool_without_the_list():
    from pgpsam_jax.config import default_config
    from pgpsam_jax.data.dataset import unseen_slices
    from pgpsam_jax.data.layouts.label_table import LabelTable
    from tests.support.small_run import TABLE

    config = default_config()
    config.fewshot.min_pixels = 2
    truth = np.zeros((5, 3, 3), np.uint8)
    truth[1, 0, :2] = truth[2, 0, :2] = truth[4, 0, :2] = 1
    truth[3, 0, :2] = (1, 2)  # one pixel of each organ: too few
    region = unseen_slices(config.fewshot, LabelTable.from_json(TABLE), [("a", 2), ("b", 1)])
    assert region("a", truth).tolist() == [False, True, False, False, True]
    assert region("c", truth).tolist() == [False, True, True, False, True]
    config.fewshot.pool = "all"
    assert region("a", truth).tolist() == [True, True, False, True, True]
