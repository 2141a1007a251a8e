"""Neighbors that look like one person's volumes are told of, and strangers are not."""

import numpy as np
import pytest

from pgpsam_jax import verify
from pgpsam_jax.data.quality import appearance, neighbors
from pgpsam_jax.data.quality.verification import findings_of
from tests.support.places import shared

QUANTILES = len(appearance.QUANTILES)


def records(whole, group=lambda i: ""):
    return [
        {
            "case": f"case{i}",
            "group": group(i),
            "kind": "image",
            "appearance": {"whole": [float(q) for q in sorted(row)]},
        }
        for i, row in enumerate(whole)
    ]


def of_persons(rng, persons, scans, likeness=0.2):
    """Quantiles of volumes: persons differ in scale and shape, their volumes by a part of that."""
    person = rng.normal(size=(persons, 1, QUANTILES))
    scan = rng.normal(size=(persons, scans, QUANTILES))
    looks = np.sort(np.linspace(0, 8, QUANTILES) + person + likeness * scan, axis=-1)
    return (looks * np.exp(rng.normal(0, 0.1, (persons, 1, 1)))).reshape(-1, QUANTILES)


@pytest.mark.parametrize("scans", [2, 3])
def test_volumes_of_one_person_in_a_row_are_told_of(scans):
    for seed in range(5):
        whole = of_persons(np.random.default_rng(seed), 30, scans)
        found = neighbors.check(records(whole))
        assert found is not None and found.level == "warning" and found.code == "neighbors"
        assert "data.split=group" in found.message
        first, second = found.message.split("as ")[1].split(",")[0].split(" and ")
        first, second = (int(name.removeprefix("case")) for name in (first, second))
        assert second == first + 1 and first // scans == second // scans
        unit = neighbors.check(records(1000 * whole + 7))  # whatever their unit
        assert unit is not None and unit.message == found.message


def test_known_groups_are_not_told_of():
    whole = of_persons(np.random.default_rng(0), 30, 2)
    assert neighbors.check(records(whole, group=lambda i: str(i // 2))) is None


def test_strangers_are_not_told_of():
    """Nor are ten cases of a scanner, then ten of another, nor a drift, nor equal images."""
    for seed in range(15):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(3, 150))
        strangers = of_persons(rng, count, 1)
        assert neighbors.check(records(strangers)) is None
        sites = np.repeat(rng.normal(0, 3, (count // 20 + 1, 1)), 20, axis=0)[:count]
        assert neighbors.check(records(strangers + sites)) is None
        assert neighbors.check(records(strangers + np.linspace(0, 4, count)[:, None])) is None
    assert neighbors.check(records(np.ones((40, QUANTILES)))) is None


def test_numbers_in_ids_are_in_their_order():
    whole = of_persons(np.random.default_rng(0), 30, 2)
    made = records(whole)
    assert neighbors.check(sorted(made, key=lambda record: record["case"])) == neighbors.check(made)


@pytest.mark.golden
def test_the_hippocampus_set_is_told_of():
    """By the images alone, whose names name no persons; once they are named, no more."""
    root, told = shared("data/msd_hippocampus"), {}
    for pattern in ("", "([0-9]+)"):
        report = verify.verify(root, group=pattern, say=lambda line: None)
        told[pattern] = [f["message"] for f in findings_of(report) if f["code"] == "neighbors"]
    assert len(told[""]) == 1 and told["([0-9]+)"] == []
    firsts = [part.split(" and ")[0][-3:] for part in told[""][0].split("as ")[1].split(", ")[:3]]
    assert all(int(first) % 2 == 1 for first in firsts)  # 3 and 4, 7 and 8: groups (id + 1) // 2
