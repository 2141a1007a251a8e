"""Augmentation: resampling against scipy, geometry by its properties, keys, shards, retracing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import ndimage
from scipy.interpolate import BSpline

from pgpsam_jax.data import augment as module
from pgpsam_jax.data.augment import (
    AugmentConfig,
    augment,
    resample,
    sample_keys,
    warp_coordinates,
)
from pgpsam_jax.errors import UserError

SIZE = 48
NOTHING = {"rotate_probability": 0, "scale_probability": 0, "elastic_probability": 0}
ALL = AugmentConfig(
    rotate_probability=1, scale_probability=1, elastic_probability=1, exclusive=False
)
run = jax.jit(augment, static_argnums=3)
fast_keys = jax.jit(sample_keys)


def only(kind, **fields):
    return AugmentConfig(**NOTHING | {f"{kind}_probability": 1.0} | fields)


def keys(count, step=0, seed=0):
    return fast_keys(jax.random.key(seed), step, np.arange(count))


def batch(count=8, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.random((count, size, size), dtype=np.float32)
    return images, rng.integers(0, 9, images.shape).astype(np.int32)


def pixel_grid(shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def coordinates(count, config, shape=(SIZE, SIZE), seed=0):
    return np.asarray(warp_many(keys(count, seed=seed), shape, config))


@partial(jax.jit, static_argnums=(1, 2))
def warp_many(sample_keys, shape, config):
    return jax.vmap(lambda key: warp_coordinates(key, shape, config))(sample_keys)


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


def test_whole_warp_equals_scipy_at_the_same_coordinates():
    images, labels = batch(4)
    config = AugmentConfig(**vars(ALL) | {"random_window": True, "scale_range": (1.1, 2.5)})
    warped, warped_labels = run(keys(4), images, labels, config)
    places = warp_many(
        jax.vmap(lambda key: jax.random.split(key)[0])(keys(4)), (SIZE, SIZE), config
    )
    for n in range(4):
        where = places[n]
        read = partial(ndimage.map_coordinates, coordinates=where, mode="grid-constant")
        np.testing.assert_allclose(warped[n], read(images[n], order=1), atol=1e-5)
        clear = np.all(np.abs(np.asarray(where) % 1 - 0.5) > 1e-4, axis=0)
        expected = read(labels[n], order=0)
        np.testing.assert_array_equal(np.asarray(warped_labels[n])[clear], expected[clear])
        assert np.mean(clear) > 0.99


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_probabilities_change_no_bit(dtype):
    images, labels = batch()
    images = jnp.asarray(images, dtype)
    same, same_labels = run(keys(8), images, labels, AugmentConfig(**NOTHING))
    assert same.dtype == dtype and same_labels.dtype == labels.dtype
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(same_labels, labels)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_samples_that_draw_nothing_keep_every_bit(dtype):
    images, labels = batch(64)
    images = jnp.asarray(images, dtype)
    warped, warped_labels = run(keys(64), images, labels, AugmentConfig())
    assert warped.dtype == dtype and warped_labels.dtype == labels.dtype
    untouched = np.all(np.asarray(warped == images), axis=(1, 2))
    assert 4 <= untouched.sum() <= 25  # one in five is expected
    np.testing.assert_array_equal(warped_labels[untouched], labels[untouched])


def test_rotation_turns_rigidly_about_the_centre_both_ways():
    shape = (40, 56)
    where = coordinates(200, only("rotate", rotate_degrees=20), shape)
    centre = (np.array(shape) - 1) / 2
    point = pixel_grid(shape) - centre[:, None, None]
    turned = where - centre[:, None, None]
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
    centre = (SIZE - 1) / 2
    expected = centre + (pixel_grid((SIZE, SIZE)) - centre) / 1.25
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
    active = np.asarray(jax.vmap(lambda u: module._choose(u, config))(draws))
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


@settings(max_examples=15, deadline=None)
@given(
    classes=st.sets(st.integers(1, 8), min_size=1, max_size=4),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_class_appears_that_was_not_there(classes, seed):
    # Neighbouring ids would blend into others under linear interpolation.
    rng = np.random.default_rng(seed)
    labels = rng.choice(sorted(classes), (4, SIZE, SIZE)).astype(np.int32)
    _, warped = run(keys(4, seed=seed), np.zeros(labels.shape, np.float32), labels, ALL)
    assert set(np.unique(warped)) <= classes | {0}


@pytest.mark.parametrize(
    "config",
    [only("rotate"), only("scale"), only("elastic"), ALL],
    ids=["rotate", "scale", "elastic", "all"],
)
def test_image_and_label_stay_aligned(config):
    # Off centre: a label turned the other way would land elsewhere.
    label = np.zeros((8, 96, 96), np.int32)
    label[:, 16:48, 52:80] = 5
    image, warped = run(keys(8), (label > 0).astype(np.float32), label, config)
    bright, labelled = np.asarray(image) > 0.5, np.asarray(warped) == 5
    overlap = 2 * (bright & labelled).sum((1, 2)) / (bright.sum((1, 2)) + labelled.sum((1, 2)))
    assert overlap.min() > 0.97
    moved = 2 * (labelled & (label == 5)).sum((1, 2))
    assert (moved / (labelled.sum((1, 2)) + (label == 5).sum((1, 2)))).min() < 0.93


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


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 10**6),
    cut=st.integers(1, 11),
)
def test_keys_depend_on_seed_step_and_global_position_only(seed, step, cut):
    key = jax.random.key(seed)
    whole = jax.random.key_data(fast_keys(key, step, np.arange(12)))
    parts = [fast_keys(key, step, np.arange(*ends)) for ends in ((0, cut), (cut, 12))]
    np.testing.assert_array_equal(whole, np.concatenate([jax.random.key_data(p) for p in parts]))
    later = jax.random.key_data(fast_keys(key, step + 1, np.arange(12)))
    assert len(np.unique(np.concatenate([whole, later]), axis=0)) == 24


@pytest.mark.parametrize("devices", [2, 8])
def test_result_does_not_depend_on_the_number_of_devices(devices):
    images, labels = batch()
    config = AugmentConfig(**vars(ALL) | {"noise_probability": 0.5})
    expected = run(keys(8), images, labels, config)
    split = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))
    sharded_keys = fast_keys(jax.random.key(0), 0, jax.device_put(np.arange(8), split))
    shards = run(sharded_keys, *jax.device_put((images, labels), split), config)
    for ours, whole in zip(shards, expected, strict=True):
        assert ours.sharding.is_equivalent_to(split, 3)
        np.testing.assert_array_equal(ours, whole)


def test_sharded_augmentation_needs_no_communication():
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    arguments = jax.device_put((keys(8), *batch()), split)
    program = run.lower(*arguments, ALL).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


def test_one_compilation_serves_every_step():
    traces = []

    @jax.jit
    def step_function(key, step, images, labels):
        traces.append(step)
        positions = jnp.arange(images.shape[0])
        return augment(sample_keys(key, step, positions), images, labels, ALL)

    images, labels = batch(4)
    outputs = [step_function(jax.random.key(0), step, images, labels)[0] for step in range(4)]
    assert len(traces) == 1
    assert not np.array_equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"rotate_probability": 1.2}, "rotate_probability"),
        ({"noise_probability": -0.1}, "noise_probability"),
        ({"rotate_probability": 0.6}, "exclusive"),
        ({"scale_range": (1.2, 0.8)}, "scale_range"),
        ({"scale_range": (0.0, 1.0)}, "scale_range"),
        ({"elastic_grid": 3}, "elastic_grid"),
        ({"elastic_amplitude": 0.2}, "folds"),
    ],
)
def test_impossible_settings_are_refused_with_the_field_named(fields, word):
    with pytest.raises(UserError, match=word):
        AugmentConfig(**fields)


def test_settings_from_a_list_are_still_a_static_argument():
    assert hash(AugmentConfig(scale_range=[0.8, 1.25])) == hash(AugmentConfig())
