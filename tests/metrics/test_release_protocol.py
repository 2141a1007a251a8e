"""Protocol `release` against a literal loop over slices and volumes, and its rules one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgpsam_jax.metrics import aggregate
from pgpsam_jax.metrics.overlap import dice_of_counts, overlap_counts
from pgpsam_jax.metrics.protocols import COLUMNS, METRICS, score_case
from pgpsam_jax.metrics.release_protocol import SLICE_COLUMNS, mean_slice_dice, score_release
from pgpsam_jax.metrics.summary import summarize

NAMES = ("background", "spleen", "liver", "aorta")
NAN = float("nan")


def literal(items, num_classes):
    """ "Dice", "mcDice" and the Dice of each class over (prediction, truth) items, step by step.

    As the release goes about it, with its special case written out: a prediction of background
    alone, where the truth is not, gives 0 to the item and to each class of the truth.
    """
    of_items, of_classes = [], {k: [] for k in range(1, num_classes)}
    for prediction, truth in items:
        if not prediction.any() and not truth.any():
            continue
        if not prediction.any():
            of_items.append(0.0)
            for k in range(1, num_classes):
                if (truth == k).any():
                    of_classes[k].append(0.0)
            continue
        scores = []
        for k in range(1, num_classes):
            p, t = prediction == k, truth == k
            if p.any() or t.any():
                scores.append(2 * (p & t).sum() / (p.sum() + t.sum()))
                of_classes[k].append(scores[-1])
        of_items.append(sum(scores) / len(scores))
    means = [sum(v) / len(v) if v else NAN for v in of_classes.values()]
    defined = [mean for mean in means if mean == mean]
    if not defined:
        return [NAN, NAN, *means]
    return [sum(of_items) / len(of_items), sum(defined) / len(defined), *means]


def summary_of(cases, min_pixels, regions=None):
    """The summary of {case: (prediction, truth)}, by way of the rows."""
    rows, slices = [], []
    for case, pair in cases.items():
        rows += score_case(*pair, (3.0, 1.0, 1.0), NAMES, case_id=case)
        region = None if regions is None else regions[case]
        more = score_release(*pair, NAMES, case_id=case, min_pixels=min_pixels, region=region)
        rows, slices = rows + more[0], slices + more[1]
    return summarize(rows, slices)["release"]


volumes = hnp.arrays(np.uint8, (3, 4, 4), elements=st.sampled_from([0, 0, 0, 0, 1, 2, 3]))
pairs = st.tuples(volumes, volumes, st.booleans())  # the flag empties the prediction


@settings(max_examples=80, deadline=None)
@given(st.lists(pairs, min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 7))
def test_both_modes_equal_the_literal_loop(drawn, min_pixels, left_out):
    cases = {str(i): (p * np.uint8(not empty), t) for i, (p, t, empty) in enumerate(drawn)}
    region = np.array([bool(left_out & 1 << place) for place in range(3)])
    for regions in (None, dict.fromkeys(cases, region)):
        slices, whole = [], []
        for prediction, truth in cases.values():
            kept = [
                z
                for z in range(3)
                if any((truth[z] == k).sum() >= min_pixels for k in (1, 2, 3))
                and (regions is None or region[z])
            ]
            slices += [(prediction[z], truth[z]) for z in kept]
            whole.append((prediction[kept], truth[kept]))
        got = summary_of(cases, min_pixels, regions)
        organs = [got["per_class"][name] for name in NAMES[1:]]
        found = [got["dice_case_mean"], got["dice_class_mean"], *(one["dice"] for one in organs)]
        want = literal(whole, len(NAMES))
        np.testing.assert_allclose(np.array(found, float), want, rtol=1e-12)
        if not slices:  # no valid slice anywhere: nothing is claimed of slices
            assert "slice_dice" not in got and got["dice_case_mean"] is None
            continue
        found = [got["slice_dice"], got["slice_mcdice"], *(one["slice_dice"] for one in organs)]
        want = literal(slices, len(NAMES))
        np.testing.assert_allclose(np.array(found, float), want, rtol=1e-12)
        assert got["n_slices"] == len(slices)
        stacked = [np.stack(side) for side in zip(*slices, strict=True)]
        assert mean_slice_dice(*stacked, len(NAMES)) == pytest.approx(want[0], rel=1e-12)


def one_slice(*organs):
    """A slice (1, 8, 8) in which organ k has the rows 2k - 2 and 2k - 1, as far as listed."""
    ids = np.zeros((1, 8, 8), np.uint8)
    for k in organs:
        ids[0, 2 * k - 2 : 2 * k] = k
    return ids


@pytest.mark.parametrize(
    ("predicted", "true", "dice", "per_class"),
    [
        ((), (1, 2), 0.0, (0.0, 0.0, NAN)),  # background alone: the item and its classes get 0
        ((1,), (1, 2), 0.5, (1.0, 0.0, NAN)),  # missed
        ((1, 2, 3), (1, 2), 2 / 3, (1.0, 1.0, 0.0)),  # a false positive adds a 0 to its class
        ((1, 2), (1, 2), 1.0, (1.0, 1.0, NAN)),
    ],
)
def test_rules_of_one_item(predicted, true, dice, per_class):
    pair = one_slice(*predicted), one_slice(*true)
    counts = overlap_counts(*pair, 4)
    np.testing.assert_array_equal(dice_of_counts(counts)[0], per_class)
    assert mean_slice_dice(*pair, 4) == pytest.approx(dice)


def test_the_two_means_differ():
    """Two slices: an organ in one of them weighs as much as one in both in the class mean."""
    prediction = np.concatenate([one_slice(1), one_slice(1)])
    truth = np.concatenate([one_slice(1), one_slice(1, 2)])
    scores = dice_of_counts(overlap_counts(prediction, truth, 4))
    assert aggregate.case_mean(scores) == pytest.approx((1.0 + 0.5) / 2)
    assert aggregate.class_mean(scores) == pytest.approx((1.0 + 0.0) / 2)


def test_only_valid_slices_count():
    """Slice 0 has an organ of 2 pixels, slice 1 one of 3; predictions are right nowhere else."""
    truth, prediction = np.zeros((2, 4, 8, 8), np.uint8)
    truth[0, 0, :2], truth[1, 0, :3], truth[1, 1, :2] = 1, 1, 2
    prediction[:] = truth
    prediction[2:] = 3  # a false positive all over slices without organs is not seen
    rows, slices = score_release(prediction, truth, NAMES, case_id=7, min_pixels=3)
    assert {row["slice"] for row in slices} == {1} and len(slices) == 3
    found = {row["class"]: (row["value"], row["truth_voxels"], row["status"]) for row in rows}
    assert found["spleen"] == (1.0, 3, "ok") and found["liver"] == (1.0, 2, "ok")
    assert found["aorta"][1:] == (0, "both_empty") and np.isnan(found["aorta"][0])
    rows, slices = score_release(prediction, truth, NAMES, case_id=7, min_pixels=4)
    assert slices == [] and {row["status"] for row in rows} == {"both_empty"}
    rows, slices = score_release(
        prediction, truth, NAMES, case_id=7, min_pixels=2, region=np.arange(4) == 0
    )
    assert {row["slice"] for row in slices} == {0} and rows[0]["truth_voxels"] == 2


def test_rows_fit_the_tables():
    label_map = np.ones((2, 3, 4), np.int16)
    rows, slices = score_release(label_map, label_map, NAMES, case_id="a", min_pixels=1)
    assert all(tuple(row) == COLUMNS for row in rows) and len(rows) == 3
    assert all(tuple(row) == SLICE_COLUMNS for row in slices) and len(slices) == 2 * 3
    assert {type(v) for row in rows + slices for v in row.values()} == {str, int, float}
    assert {(row["protocol"], row["metric"]) for row in rows} == {("release", "dice")}
    assert METRICS["release"] == ("dice",)
