"""Smoothing across slices and connected components, against plain loops."""

import numpy as np
import pytest
from scipy import ndimage

from pgpsam_jax.inference.postprocessing import keep_components, smooth_slices, uncertainty


def test_smoothing_is_a_gaussian_over_slices_that_continues_outward():
    rng, deviation = np.random.default_rng(0), 1.3
    found = rng.dirichlet(np.ones(3), (7, 4, 5)).astype(np.float32)
    reach = int(3 * deviation + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    wanted = np.zeros_like(found)
    for z in range(7):
        for step, weight in zip(range(-reach, reach + 1), weights / weights.sum(), strict=True):
            wanted[z] += weight * found[min(max(z + step, 0), 6)]
    smooth = smooth_slices(found, deviation)
    np.testing.assert_allclose(smooth, wanted, atol=1e-6)
    np.testing.assert_allclose(smooth.sum(-1), 1, atol=1e-6)
    assert smooth_slices(found.astype(np.float16), deviation).dtype == np.float16


@pytest.mark.parametrize("seed", range(5))
def test_components_are_kept_by_their_share_of_the_largest(seed):
    rng = np.random.default_rng(seed)
    ids = rng.choice(3, (6, 9, 10), p=(0.86, 0.07, 0.07)).astype(np.uint8)
    for shares in ((0.0, 0.0), (1.0, 0.0), (0.4, 0.7), (0.0, 1.0)):
        wanted = ids.copy()
        for k, share in enumerate(shares, 1):
            parts, count = ndimage.label(ids == k, np.ones((3, 3, 3)))
            sizes = [(parts == i).sum() for i in range(1, count + 1)]
            for i, size in enumerate(sizes, 1):
                if size < share * max(sizes):
                    wanted[parts == i] = 0
        before = ids.copy()
        np.testing.assert_array_equal(keep_components(ids, shares), wanted)
        np.testing.assert_array_equal(ids, before)  # untouched


def test_two_kidneys_stay_two_and_specks_go():
    ids = np.zeros((3, 8, 12), np.uint8)
    ids[:, 1:5, 1:4] = ids[:, 1:4, 7:10] = 1
    speck = ids.copy()
    speck[0, 7, 11] = 1
    np.testing.assert_array_equal(keep_components(speck, (0.3,)), ids)
    assert keep_components(speck, (1.0,))[:, :, 6:].any() == False  # noqa: E712
    np.testing.assert_array_equal(keep_components(speck, ()), speck)
    np.testing.assert_array_equal(keep_components(0 * ids, (1.0,)), 0 * ids)


def test_uncertainty_is_the_entropy_as_a_share_of_the_largest():
    certain, alike = np.zeros((1, 2, 2, 4)), np.full((1, 2, 2, 4), 0.25)
    certain[..., 1] = 1
    np.testing.assert_array_equal(uncertainty(certain), np.zeros((1, 2, 2), np.float32))
    np.testing.assert_allclose(uncertainty(alike.astype(np.float16)), 1, atol=1e-3)
    halves = np.zeros((1, 1, 1, 4))
    halves[..., :2] = 0.5
    np.testing.assert_allclose(uncertainty(halves), 0.5, atol=1e-6)
