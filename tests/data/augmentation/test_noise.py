"""The kinds of noise: rates, distributions against numpy and scipy."""

import jax
import numpy as np
import pytest
from scipy import stats

from pgpsam_jax.config.augmentation import RELEASE, AugmentConfig
from pgpsam_jax.data.augmentation.noise import add_noise
from tests.support.augment_samples import NOTHING, batch, keys, run


def test_noise_is_gaussian_clipped_and_leaves_labels_alone():
    labels = batch(64)[1]
    images = np.full(labels.shape, 0.5, np.float32)
    config = AugmentConfig(**NOTHING, noise_probability=0.5, noise_sigma=0.04)
    noisy, same_labels = run(keys(64), images, labels, config)
    spread = np.asarray(noisy - images).std(axis=(1, 2))
    assert 18 <= (spread > 0).sum() <= 46
    np.testing.assert_allclose(spread[spread > 0], 0.04, rtol=0.1)
    np.testing.assert_array_equal(same_labels, labels)
    edge, _ = run(keys(64), np.ones(labels.shape, np.float32), labels, config)
    assert edge.max() == 1 and edge.min() > 0.7


PICTURES = np.tile(np.linspace(0, 1, 256, dtype=np.float32)[:, None], (600, 1, 8))
noise_of = jax.jit(jax.vmap(add_noise, (0, 0, None)), static_argnums=2)


@pytest.fixture(scope="module")
def noisy():
    return np.asarray(noise_of(keys(600), PICTURES, RELEASE))


NOTHING_DRAWN, POISSON, GAUSSIAN, SALT_AND_PEPPER = range(4)


def kinds(noisy):
    """Which kind each sample has, told by its mean absolute change at middle gray values."""
    return np.digitize(np.abs(noisy - PICTURES)[:, 64:192].mean((1, 2)), [1e-9, 0.01, 0.06])


def test_at_most_one_kind_at_the_stated_rates(noisy):
    found = kinds(noisy)
    rates = np.bincount(found, minlength=4) / len(noisy)
    np.testing.assert_allclose(rates, [0.4, 0.2, 0.3, 0.1], atol=0.06)
    untouched = found == NOTHING_DRAWN
    np.testing.assert_array_equal(noisy[untouched], PICTURES[untouched])
    assert noisy.min() == 0 and noisy.max() == 1
    same = noise_of(keys(600), PICTURES, RELEASE)
    np.testing.assert_array_equal(noisy, same)


def test_gaussian_noise_of_the_release(noisy):
    change = (noisy - PICTURES)[kinds(noisy) == GAUSSIAN][:, 64:192]
    assert 255 * change.std() == pytest.approx(10, rel=0.02)
    assert stats.kstest(change[:, 0, 0] * 25.5, "norm").pvalue > 1e-3


def test_salt_and_pepper_sets_three_pixels_in_ten(noisy):
    salted = noisy[kinds(noisy) == SALT_AND_PEPPER][:, 1:-1]
    clean = PICTURES[: len(salted), 1:-1]
    assert (salted == 1).mean() == pytest.approx(0.15, abs=0.01)
    assert (salted == 0).mean() == pytest.approx(0.15, abs=0.01)
    kept = (salted > 0) & (salted < 1)
    np.testing.assert_array_equal(salted[kept], clean[kept])


def test_poisson_noise_grows_with_the_square_root_of_the_gray_value(noisy):
    change = 255 * (noisy - PICTURES)[kinds(noisy) == POISSON][:, :224]
    gray = np.arange(224)
    np.testing.assert_allclose(change.std((0, 2)), np.sqrt(gray / 256), rtol=0.12, atol=1e-6)
    np.testing.assert_allclose(change.mean((0, 2)), 0, atol=0.12)


@pytest.mark.parametrize(("levels", "scale"), [(1, 1), (2, 2), (100, 128), (128, 128), (129, 256)])
def test_poisson_counts_scale_with_the_gray_levels_of_the_picture(levels, scale):
    picture = np.full((256, 128), 200, np.float32)
    picture[:levels, 0] = np.arange(200, 200 - levels, -1)
    config = AugmentConfig(**NOTHING, poisson_probability=1.0)
    change = 255 * np.asarray(noise_of(keys(1), picture[None] / 255, config))[0] - picture
    assert change[:, 1:].std() == pytest.approx(np.sqrt(200 / scale), rel=0.02)


@pytest.mark.parametrize("scale", [128, 256])
def test_normal_noise_has_the_quantiles_of_poisson_noise(scale):
    share = np.linspace(0.001, 0.999, 999)
    for gray in (1, 5, 50, 255):
        exact = stats.poisson(gray * scale).ppf(share) / scale
        normal = gray + np.sqrt(gray / scale) * stats.norm.ppf(share)
        assert np.abs(exact - normal).max() < 2 / scale
