"""Metrics against MONAI, medpy, surface-distance and an O(n^2) oracle; both protocols."""

import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics import surface
from pgpsam_jax.metrics.protocols import COLUMNS, score_case
from tests.reference.surface_oracle import oracle_surface
from tests.support import mask_scores
from tests.support.optional import torch

NAN = float("nan")
SPACING = (3.0, 0.8, 1.2)
NAMES = ("background", "spleen", "liver")


def blobs(seed, shape=(14, 24, 20), cut=0.1):
    """A prediction and a truth: two correlated smooth random masks, some touching the border."""
    rng = np.random.default_rng(seed)
    base, change = (ndimage.gaussian_filter(rng.normal(size=shape), 2.0) for _ in range(2))
    scale = base.std()
    return base + 0.4 * change > cut * scale, base > cut * scale


def oracle_distances(source, target, spacing, region):
    """min over the target's surface, for every surface voxel of the source in a scored slice."""
    targets = oracle_surface(target)
    return [
        min(
            (math.dist(np.multiply(p, spacing), np.multiply(q, spacing)) for q in targets),
            default=math.inf,
        )
        for p in oracle_surface(source)
        if region is None or region[p[0]]
    ]


small_masks = hnp.arrays(bool, (4, 5, 4))
regions = st.none() | hnp.arrays(bool, 4)
spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)


@settings(max_examples=20, deadline=None)
@given(small_masks, small_masks, spacings, regions)
def test_distances_and_region_equal_the_brute_force_oracle(prediction, truth, spacing, region):
    got = mask_scores.surface_distances(prediction, truth, spacing, region)
    want = (
        oracle_distances(prediction, truth, spacing, region),
        oracle_distances(truth, prediction, spacing, region),
    )
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    scored = np.ones(4, bool) if region is None else region
    overlap = (prediction & truth)[scored].sum()
    size = prediction[scored].sum() + truth[scored].sum()
    want_dice = 2 * overlap / size if size else NAN
    np.testing.assert_equal(surface.dice(prediction, truth, region), want_dice)
    got_hd = mask_scores.hd95(prediction, truth, spacing, region)
    got_nsd = mask_scores.nsd(prediction, truth, spacing, 1.5, region)
    if want[0] and want[1]:
        want_hd = max(np.percentile(want[0], 95), np.percentile(want[1], 95))
        np.testing.assert_allclose(got_hd, want_hd, rtol=1e-12)
        both = np.array(want[0] + want[1])
        assert np.isclose(got_nsd, np.mean(both <= 1.5)) or np.isclose(both, 1.5).any()
    else:
        assert math.isnan(got_hd)
        np.testing.assert_equal(got_nsd, 0.0 if want[0] or want[1] else NAN)


def test_region_measures_to_the_surface_of_the_whole_volume():
    """Slices 2..5 hold the organ; only slice 3 is scored, where truth is one voxel wider."""
    prediction, truth = np.zeros((2, 8, 9, 9), bool)
    prediction[2:6, 3:6, 3:6] = True
    truth[2:6, 3:6, 3:7] = True
    region = np.arange(8) == 3
    forward, backward = mask_scores.surface_distances(prediction, truth, (1.0, 1.0, 1.0), region)
    assert len(forward) == 8 and len(backward) == 10  # the rims; slice 3 is no cap of the organ
    assert surface.dice(prediction, truth, region) == pytest.approx(2 * 9 / (9 + 12))
    # The right rim of the prediction is 1 away from the wider truth; its other voxels lie on it.
    np.testing.assert_array_equal(np.sort(forward), [0, 0, 0, 0, 0, 0, 0, 1])
    prediction[3], truth[3] = False, False
    prediction[3, 4, 4] = True
    # Missed in the scored slice, though the neighboring slices hold the other mask.
    assert surface.dice(prediction, truth, region) == 0.0
    assert mask_scores.nsd(prediction, truth, SPACING, 9.0, region) == 0.0
    assert math.isnan(mask_scores.hd95(prediction, truth, SPACING, region))


def values(prediction, truth, spacing=SPACING, tolerance=2.0):
    return np.array(
        [
            surface.dice(prediction, truth),
            mask_scores.hd95(prediction, truth, spacing),
            mask_scores.nsd(prediction, truth, spacing, tolerance),
            mask_scores.hd95_pooled(prediction, truth),
        ]
    )


@settings(max_examples=40, deadline=None)
@given(
    small_masks,
    small_masks,
    st.permutations(range(3)),
    st.tuples(*[st.booleans()] * 3),
    st.tuples(*[st.integers(0, 3)] * 3),
    st.floats(0.1, 10.0),
)
def test_symmetry_flips_translation_and_spacing(prediction, truth, axes, flips, shift, factor):
    want = values(prediction, truth)
    np.testing.assert_equal(values(truth, prediction), want)
    flipped = [np.flip(m, [a for a in range(3) if flips[a]]) for m in (prediction, truth)]
    np.testing.assert_allclose(values(*flipped), want, rtol=1e-12)
    turned = [m.transpose(axes) for m in (prediction, truth)]
    np.testing.assert_allclose(values(*turned, tuple(SPACING[a] for a in axes)), want, rtol=1e-12)
    moved = [np.pad(m, [(s, 4 - s) for s in shift]) for m in (prediction, truth)]
    np.testing.assert_array_equal(values(*moved), want)
    scaled = values(prediction, truth, tuple(factor * s for s in SPACING), factor * 2.0)
    np.testing.assert_allclose(scaled, want * [1, factor, 1, 1], rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(small_masks.filter(lambda m: m.any()), spacings)
def test_identity_is_perfect(mask, spacing):
    np.testing.assert_array_equal(values(mask, mask, spacing, 0.0), [1, 0, 1, 0])


def test_border_and_full_masks():
    full = np.ones((6, 7, 8), bool)
    np.testing.assert_array_equal(values(full, full), [1, 0, 1, 0])
    assert surface.surface(full).sum() == full.size - 4 * 5 * 6  # all but the inside
    slab = full.copy()
    slab[3:] = False
    assert mask_scores.hd95(slab, full, (2.0, 1.0, 1.0)) == 6.0  # slice 5 to slice 2 of 2 mm
    assert mask_scores.hd95(full[:1], full[:1], SPACING) == 0.0  # one slice: all of it is surface


@pytest.mark.parametrize("voxels_per_point", [0, 10**9])
def test_tree_and_distance_transform_agree(monkeypatch, voxels_per_point):
    """Whichever way is cheaper is taken; the choice must not show in any number."""
    pairs = [blobs(seed) for seed in range(4)]
    want = [values(*pair) for pair in pairs]
    monkeypatch.setattr(surface, "_VOXELS_PER_TREE_POINT", voxels_per_point)
    np.testing.assert_allclose([values(*pair) for pair in pairs], want, rtol=1e-12)


def test_tolerance_includes_its_own_distance():
    """float32 0.8 mm, as a NIfTI header stores it, is 1.2e-8 more than 0.8: still within 0.8."""
    prediction, truth = np.zeros((2, 1, 1, 9), bool)
    prediction[0, 0, 2], truth[0, 0, 3] = True, True
    spacing = tuple(float(np.float32(0.8)) for _ in range(3))
    assert mask_scores.nsd(prediction, truth, spacing, 0.8) == 1.0
    assert mask_scores.nsd(prediction, truth, spacing, 0.79) == 0.0


PAIRS = [(seed, cut) for seed in range(3) for cut in (0.1, 1.2)]


@pytest.mark.slow  # importing MONAI takes seconds; the oracle above checks the same
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("seed", "cut"), PAIRS)
def test_equals_monai(seed, cut):
    pytest.importorskip("monai", reason="MONAI is a test extra")
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    pair = blobs(seed, cut=cut)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in pair]
    with_background = {"include_background": True, "spacing": SPACING}
    hausdorff = compute_hausdorff_distance(
        *tensors, percentile=95, directed=False, **with_background
    )
    np.testing.assert_allclose(mask_scores.hd95(*pair, SPACING), hausdorff.item(), rtol=1e-6)
    for tolerance in (0.5, 1.0, 2.0, 3.0):
        share = compute_surface_dice(*tensors, class_thresholds=[tolerance], **with_background)
        got = mask_scores.nsd(*pair, SPACING, tolerance)
        np.testing.assert_allclose(got, share.item(), rtol=1e-6)
    overlap = compute_dice(*tensors, include_background=True).item()
    np.testing.assert_allclose(surface.dice(*pair), overlap, rtol=1e-6)


@pytest.mark.parametrize(("seed", "cut"), PAIRS)
def test_equals_medpy(seed, cut):
    binary = pytest.importorskip("medpy.metric.binary", reason="medpy is a test extra")
    pair = blobs(seed, cut=cut)
    assert mask_scores.hd95_pooled(*pair) == pytest.approx(binary.hd95(*pair), rel=1e-12)
    in_mm = binary.hd95(*pair, voxelspacing=SPACING)
    assert mask_scores.hd95_pooled(*pair, SPACING) == pytest.approx(in_mm, rel=1e-12)
    assert surface.dice(*pair) == pytest.approx(binary.dc(*pair), rel=1e-12)


def test_directed_and_pooled_hd95_differ_on_a_distant_false_positive():
    """3 of 30 predicted voxels lie 20 mm off: a tenth of one direction, 3 in 57 of both."""
    prediction, truth = np.zeros((2, 1, 12, 60), bool)
    truth[0, 0, :27], prediction[0, 0, :27], prediction[0, 10, :3] = True, True, True
    spacing = (1.0, 2.0, 1.0)
    assert mask_scores.hd95(prediction, truth, spacing) == 20.0
    # Rank 0.95 x 56 = 53.2 of 54 zeros and three 20s: a fifth of the way from 0 to 20.
    assert mask_scores.hd95_pooled(prediction, truth, spacing) == pytest.approx(4.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", range(3))
def test_equals_surface_distance_where_definitions_agree(seed):
    """Its distances weigh surfels by area, so only Dice and, on cubes, the maximum agree."""
    reason = "surface-distance is an optional cross-check"
    library = pytest.importorskip("surface_distance", reason=reason)
    pair = blobs(seed)
    assert surface.dice(*pair) == pytest.approx(library.compute_dice_coefficient(*reversed(pair)))
    truth, moved = np.zeros((2, 12, 12, 12), bool)
    truth[3:7, 3:7, 3:7] = True
    moved[3 + seed : 7 + seed, 3:7, 3:7] = True
    both = library.compute_surface_distances(truth, moved, SPACING)
    largest = library.compute_robust_hausdorff(both, 100)
    distances = mask_scores.surface_distances(moved, truth, SPACING)
    assert surface.directed_percentile(*distances, 100) == pytest.approx(largest)


def rows_of(prediction, truth, **settings):
    rows = score_case(prediction, truth, SPACING, NAMES, case_id="case1", **settings)
    return {(r["class"], r["protocol"], r["metric"]): r for r in rows}


EMPTY = {
    # status: (truth, prediction, strict dice hd95 nsd, transunet dice hd95)
    "both_empty": (0, 0, (NAN, NAN, NAN), (0, 0)),
    "missed": (1, 0, (0, NAN, 0), (0, 0)),
    "hallucinated": (0, 1, (0, NAN, 0), (1, 0)),
    "ok": (1, 1, (1, 0, 1), (1, 0)),
}


@pytest.mark.parametrize("status", EMPTY)
@pytest.mark.parametrize("by_region", [False, True])
def test_every_empty_mask_case(status, by_region):
    has_truth, has_prediction, strict, transunet = EMPTY[status]
    truth, prediction = np.zeros((2, 6, 6, 6), np.uint8)
    truth[2:4, 2:5, 2:5], prediction[2:4, 2:5, 2:5] = has_truth, has_prediction
    region = None
    if by_region:  # what lies outside the scored slices must not change the status
        truth[5], prediction[0] = 1, 1
        region = np.isin(np.arange(6), (2, 3))
    rows = rows_of(prediction, truth, region=region)
    got = [rows["spleen", "strict", m]["value"] for m in ("dice", "hd95", "nsd")]
    np.testing.assert_array_equal(got, strict)
    got = [rows["spleen", "transunet", m]["value"] for m in ("dice", "hd95")]
    np.testing.assert_array_equal(got, transunet)
    assert {r["status"] for key, r in rows.items() if key[0] == "spleen"} == {status}
    assert {r["status"] for key, r in rows.items() if key[0] == "liver"} == {"both_empty"}
    counts = rows["spleen", "strict", "dice"]
    assert counts["truth_voxels"] == 18 * has_truth
    assert counts["predicted_voxels"] == 18 * has_prediction


def test_score_case_equals_the_metrics_of_each_uncropped_organ():
    truth, prediction = np.zeros((2, 14, 24, 20), np.uint8)
    for class_id, seed in ((2, 1), (1, 5)):
        mask_p, mask_t = blobs(seed, cut=1.0)
        prediction[mask_p], truth[mask_t] = class_id, class_id
    region = np.arange(14) % 3 != 0
    for scored in (None, region):
        rows = rows_of(prediction, truth, nsd_tolerance_mm=1.0, region=scored)
        assert len(rows) == 2 * 5
        for class_id, name in ((1, "spleen"), (2, "liver")):
            pair = prediction == class_id, truth == class_id
            want = {
                ("strict", "dice"): surface.dice(*pair, scored),
                ("strict", "hd95"): mask_scores.hd95(*pair, SPACING, scored),
                ("strict", "nsd"): mask_scores.nsd(*pair, SPACING, 1.0, scored),
                ("transunet", "dice"): surface.dice(*pair, scored),
                ("transunet", "hd95"): mask_scores.hd95_pooled(*pair, region=scored),
            }
            assert {k[1:]: r["value"] for k, r in rows.items() if k[0] == name} == want
    assert 0 < rows["spleen", "strict", "dice"]["value"] < 1


def test_rows_are_plain_ordered_and_picklable():
    label_map = np.ones((3, 4, 5), np.int16)
    rows = score_case(label_map, label_map, SPACING, NAMES, case_id="img0001")
    assert all(tuple(row) == COLUMNS for row in rows)
    assert {type(v) for row in rows for v in row.values()} == {str, int, float}
    assert len(pickle.loads(pickle.dumps((score_case, rows)))[1]) == 10
    order = [(row["class_id"], row["protocol"], row["metric"]) for row in rows]
    kinds = [("strict", m) for m in ("dice", "hd95", "nsd")]
    kinds += [("transunet", m) for m in ("dice", "hd95")]
    assert order == [(c, *kind) for c, kind in itertools.product((1, 2), kinds)]


def test_bad_volumes_are_refused():
    ones = np.ones((3, 4, 5), np.uint8)
    with pytest.raises(UserError, match=r"case1: prediction .* differ in shape"):
        rows_of(ones[:2], ones)
    with pytest.raises(UserError, match=r"label has class 7, .* only ids 0 to 2"):
        rows_of(ones, ones * np.uint8(7))
    with pytest.raises(UserError, match="prediction has class -1"):
        rows_of(-ones.astype(np.int16), ones)
    with pytest.raises(ValueError, match="region has shape"):
        rows_of(ones, ones, region=np.ones(4, bool))
