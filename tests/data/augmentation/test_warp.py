"""The warp of augmentation: resampling against scipy, each part by its properties."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage, stats
from scipy.interpolate import BSpline

from pgpsam_jax.config.augmentation import RELEASE, AugmentConfig
from pgpsam_jax.data.augmentation import warp as module
from pgpsam_jax.data.augmentation.warp import resample
from tests.support.augment_samples import NOTHING, SIZE, coordinates, only, pixel_grid

quick_resample = jax.jit(resample)


@pytest.mark.parametrize("shape", [(40, 40), (31, 52)])
def test_resample_equals_scipy(shape):
    rng = np.random.default_rng(1)
    image = rng.random(shape, dtype=np.float32)
    label = rng.integers(0, 9, shape).astype(np.int32)
    # Far outside, across the border and inside, none of them half-way between two pixels.
    where = rng.uniform(-6, max(shape) + 6, (2, *shape)).astype(np.float32)
    where[np.abs(where % 1 - 0.5) < 1e-4] += 0.01
    warped, warped_label = jax.jit(resample)(image, label, where)
    read = partial(ndimage.map_coordinates, coordinates=where, mode="grid-constant", cval=0)
    np.testing.assert_allclose(warped, read(image, order=1), atol=1e-5)
    np.testing.assert_array_equal(warped_label, read(label, order=0))
    assert 0.1 < np.mean(warped_label > 0) < 0.9


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 6, 7), elements=st.floats(-1e9, 1e9, width=32)),
    st.integers(0, 2**31 - 1),
    st.integers(-3, 3),
)
def test_resample_reads_only_the_picture(where, seed, shift):
    """Anywhere, however far: a label of the picture or 0, an intensity between its own and 0."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 100, (6, 7)).astype(np.float32)
    label = rng.integers(1, 9, (6, 7)).astype(np.int32)
    warped, ids = map(np.asarray, quick_resample(image, label, where))
    assert set(np.unique(ids)) <= {0, *np.unique(label)}
    low, high = min(image.min(), 0), max(image.max(), 0)
    assert low - 1e-3 <= warped.min() and warped.max() <= high + 1e-3
    grid = pixel_grid((6, 7)).astype(np.float32)
    warped, ids = map(np.asarray, quick_resample(image, label, grid + shift))
    inside = np.pad(image, 3)[3 + shift : 9 + shift, 3 + shift : 10 + shift]
    np.testing.assert_array_equal(warped, inside)
    np.testing.assert_array_equal(
        ids, np.pad(label, 3)[3 + shift : 9 + shift, 3 + shift : 10 + shift]
    )


def test_rotation_turns_rigidly_about_the_center_both_ways():
    shape = (40, 56)
    where = coordinates(200, only("rotate", rotate_degrees=20), shape)
    center = (np.array(shape) - 1) / 2
    point = pixel_grid(shape) - center[:, None, None]
    turned = where - center[:, None, None]
    np.testing.assert_allclose(
        np.hypot(*np.moveaxis(turned, 1, 0)), np.tile(np.hypot(*point), (200, 1, 1)), atol=1e-4
    )
    cross = point[0] * turned[:, 1] - point[1] * turned[:, 0]
    dot = point[0] * turned[:, 0] + point[1] * turned[:, 1]
    angles = np.rad2deg(np.arctan2(cross, dot))
    np.testing.assert_allclose(np.ptp(angles, axis=(1, 2)), 0, atol=1e-2)
    assert angles.min() < -18 and angles.max() > 18 and np.abs(angles).max() < 20.01
    assert abs(angles[:, 0, 0].mean()) < 3


def test_zoom_of_a_known_factor_and_its_range():
    where = coordinates(3, only("scale", scale_range=(1.25, 1.25)))
    center = (SIZE - 1) / 2
    expected = center + (pixel_grid((SIZE, SIZE)) - center) / 1.25
    np.testing.assert_allclose(where, np.tile(expected, (3, 1, 1, 1)), atol=1e-4)
    zoom = (SIZE - 1) / np.ptp(coordinates(300, only("scale"))[:, 0], axis=(1, 2))
    assert 0.799 < zoom.min() < 0.83 and 1.2 < zoom.max() < 1.251
    assert abs(np.log(zoom).mean()) < 0.03


def test_random_window_stays_inside_the_picture_and_moves():
    config = only("scale", scale_range=(1.1, 2.5), random_window=True)
    where = coordinates(200, config)
    # Zoom 1 / r shows r of the picture, anywhere in it.
    assert where.min() > -1e-3 and where.max() < SIZE - 1 + 1e-3
    middle = where.mean(axis=(2, 3)) - (SIZE - 1) / 2
    assert (middle.min(0) < -SIZE / 8).all() and (middle.max(0) > SIZE / 8).all()
    shrunk = coordinates(5, only("scale", scale_range=(0.8, 0.8), random_window=True))
    np.testing.assert_allclose(shrunk.mean(axis=(2, 3)), (SIZE - 1) / 2, atol=1e-3)


@pytest.mark.parametrize("controls", [4, 8, 11])
def test_spline_weights_equal_scipy(controls):
    knots = np.arange(controls + 4) - 3.0
    position = np.linspace(0, controls - 3, SIZE)
    position[-1] -= 1e-9  # scipy leaves the last knot to the next, missing, segment
    expected = BSpline.design_matrix(position, knots, 3).toarray()
    weights = module._spline_weights(SIZE, controls)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), controls=st.sampled_from([4, 6, 10]))
def test_strongest_elastic_stays_in_bounds_and_never_folds(seed, controls):
    amplitude = 0.48 / (controls - 3)
    config = only("elastic", elastic_amplitude=amplitude, elastic_grid=controls)
    where = coordinates(4, config, seed=seed)
    shift = where - pixel_grid((SIZE, SIZE))
    assert np.abs(shift).max() <= amplitude * SIZE
    assert shift.std() > 0.05 * amplitude * SIZE
    down, right = np.gradient(where, axis=(2, 3))
    determinant = down[:, 0] * right[:, 1] - down[:, 1] * right[:, 0]
    assert determinant.min() > 0


def frequencies(config):
    draws = jax.random.uniform(jax.random.key(3), (20_000, 3))
    active = np.asarray(jax.vmap(lambda u: module._active_transforms(u, config))(draws))
    assert set(np.unique(active)) <= {0.0, 1.0}
    return active.mean(0), active.sum(1)


def test_exclusive_draws_at_most_one_kind_at_the_stated_rates():
    rate, kinds = frequencies(AugmentConfig())
    np.testing.assert_allclose(rate, [0.3, 0.3, 0.2], atol=0.015)
    assert kinds.max() == 1
    thirds = {name: 1 / 3 for name in NOTHING}
    assert frequencies(AugmentConfig(**thirds))[1].min() == 1


def test_independent_draws_combine_at_the_stated_rates():
    rate, kinds = frequencies(AugmentConfig(exclusive=False))
    np.testing.assert_allclose(rate, [0.3, 0.3, 0.2], atol=0.015)
    np.testing.assert_allclose(np.mean(kinds == 3), 0.3 * 0.3 * 0.2, atol=0.005)
    np.testing.assert_allclose(np.mean(kinds == 0), 0.7 * 0.7 * 0.8, atol=0.015)


def turned(where):
    """Angles in degrees, one per sample, from the first row of pixels."""
    step = where[:, :, 0, -1] - where[:, :, 0, 0]
    return np.rad2deg(np.arctan2(step[:, 0], step[:, 1]))


def test_whole_degrees_are_the_release_s_range_and_turn_as_scipy_does():
    where = coordinates(2000, only("rotate", whole_degrees=True), (9, 9))
    angles, counts = np.unique(np.round(turned(where), 2), return_counts=True)
    np.testing.assert_array_equal(angles, np.arange(-20, 20))
    assert stats.chisquare(counts).pvalue > 1e-3
    image = np.random.default_rng(0).random((9, 9), np.float32)
    label = np.zeros((9, 9), np.int32)
    for n, angle in enumerate(turned(where[:5])):
        warped, _ = resample(image, label, where[n])
        expected = ndimage.rotate(image, angle, reshape=False, order=1, mode="grid-constant")
        np.testing.assert_allclose(warped, expected, atol=1e-4)


def test_the_side_of_a_random_window_is_uniform():
    config = only("scale", scale_range=RELEASE.scale_range, random_window=True)
    where = coordinates(2000, config, (9, 9))
    side = np.ptp(where[:, 0], axis=(1, 2)) / 8
    assert stats.kstest(side, stats.uniform(0.4, 0.5).cdf).pvalue > 1e-3
    assert 0.4 - 1e-5 < side.min() and side.max() < 0.9 + 1e-5
    start = where[:, :, 0, 0] / (8 * (1 - side))[:, None]
    assert stats.kstest(start.ravel(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("size", "pixels"), [(512, 4.07), (128, 1.02)])
def test_smooth_displacement_has_the_covariance_of_smoothed_noise(size, pixels):
    """scipy's filter of white noise has the covariance G G^T, and so has each axis of ours.

    The release smooths noise of variance 1/3 with sigma 0.08 x 512 and multiplies it by 2 x 512.
    """
    smoothing = ndimage.gaussian_filter1d(np.eye(size), 0.08 * size, axis=0, mode="constant")
    expected = smoothing @ smoothing.T
    weights = module._gaussian_weights(size).astype(float)
    ours = weights @ weights.T / size
    np.testing.assert_allclose(ours, expected, atol=0.004 * expected.max())
    deviation = 2 * size * size / 512 * np.diag(expected) / np.sqrt(3)
    assert deviation[size // 2] == pytest.approx(pixels, abs=0.01)
    ours = module._AMPLITUDE * size * np.diag(weights @ weights.T) / np.sqrt(3)
    np.testing.assert_allclose(ours, deviation, rtol=0.005)


def test_smooth_displacement_is_distributed_as_the_release_s():
    size, count = 64, 400
    weights = module._gaussian_weights(size)
    nodes = weights.shape[1]
    rng = np.random.default_rng(0)
    control = rng.uniform(-1, 1, (count, 2 * nodes**2)).astype(np.float32)
    ours = jax.vmap(lambda c: module._smooth(c, weights, weights, module._AMPLITUDE))(control)
    noise = rng.uniform(-1, 1, (2 * count, size, size))
    smooth = ndimage.gaussian_filter(noise, 0.08 * size, mode="constant", axes=(1, 2))
    theirs = smooth * (2 * size) * (size / 512)
    ours = np.asarray(ours).reshape(theirs.shape)
    # Pixels of different samples are independent.
    for row, column in ((32, 32), (0, 20), (60, 60)):
        assert stats.ks_2samp(ours[:, row, column], theirs[:, row, column]).pvalue > 1e-3
    peak, other = (np.abs(field).max((1, 2)) for field in (ours, theirs))
    assert stats.ks_2samp(peak, other).pvalue > 1e-3
    assert 0.7 < np.median(peak) * 512 / size / 10.4 < 1.1  # about 10 px at 512


def test_affine_moves_three_corners_as_opencv_defines_it():
    rng = np.random.default_rng(0)
    grid = pixel_grid((64, 64))
    for _ in range(3):
        jitter = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
        # A third of 64 about pixel 32, as (row, column): down right, up right, up left.
        corners = np.array([(53, 53), (11, 53), (11, 11)], float)
        moved = corners + 0.08 * 64 * jitter
        matrix = np.linalg.solve(np.c_[moved, np.ones(3)], corners)
        expected = np.einsum("hwi,ia->ahw", np.dstack([*grid, np.ones((64, 64))]), matrix)
        np.testing.assert_allclose(module._affine(jitter, grid), expected, atol=1e-3)


@pytest.mark.parametrize(("margin", "mode"), [(0, "mirror"), (0.5, "reflect")])
def test_mirrored_points_read_what_scipy_s_border_does(margin, mode):
    image = np.random.default_rng(0).random((20, 31))
    where = np.random.default_rng(1).uniform(-50, 80, (2, 40, 40)).astype(np.float32)
    inside = np.asarray(module._mirrored(where, image.shape, margin))
    assert inside.min() >= 0 and (inside.max((1, 2)) <= (19, 30)).all()
    expected = ndimage.map_coordinates(image, where, order=1, mode=mode)
    got = ndimage.map_coordinates(image, inside, order=1, mode="nearest")
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_gaussian_elastic_is_an_affine_picture_displaced():
    """Two readings one after the other, of a smooth picture, against one at the composed points."""
    size = 128
    grid = pixel_grid((size, size))
    control = np.random.default_rng(3).uniform(-1, 1, 6 + 2 * module._NODES**2)
    control = control.astype(np.float32)
    picture = np.sin(grid[0] / 6) + np.cos(grid[1] / 7)
    read = partial(ndimage.map_coordinates, order=1)
    affine = read(picture, module._affine(control[:6].reshape(3, 2), grid), mode="mirror")
    weights = module._gaussian_weights(size)
    shift = module._smooth(control[6:], weights, weights, module._AMPLITUDE)
    expected = read(affine, grid + np.asarray(shift), mode="reflect")
    where = np.asarray(module._affine_and_smooth(control, grid))
    error = np.abs(read(picture, where) - expected)
    assert np.quantile(error, 0.99) < 0.02 and error.max() < 0.2  # most where a mirror line passes
    assert where.min() >= 0 and where.max() <= size - 1
    assert np.abs(where - grid).max() > 5


def test_release_elastic_warps_every_pixel_and_does_not_fold():
    config = AugmentConfig(**NOTHING | {"elastic_probability": 0.5, "elastic": "gaussian"})
    where = coordinates(100, config, (64, 64))
    still = (where == pixel_grid((64, 64))).all(axis=(1, 2, 3))
    assert 30 < still.sum() < 70
    moved = where[~still][..., 12:-12, 12:-12]  # away from the mirrored border
    down, right = np.gradient(moved, axis=(2, 3))
    mirrored = (moved == 0) | (moved == 63)
    determinant = down[:, 0] * right[:, 1] - down[:, 1] * right[:, 0]
    assert (determinant[~mirrored.any(1)] > 0).mean() > 0.99
    affine = np.linalg.norm(moved - pixel_grid((64, 64))[:, 12:-12, 12:-12], axis=1)
    assert 0.03 * 64 < affine.mean() < 0.09 * 64
