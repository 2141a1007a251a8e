"""Augmentation whole: what it changes and what not, keys, shards, retracing, settings."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import ndimage

from pgpsam_jax.config import default_config, from_json, to_json
from pgpsam_jax.config.augmentation import RELEASE, AugmentConfig
from pgpsam_jax.data.augmentation.augment import augment, augmentation_seed, sample_keys
from pgpsam_jax.errors import UserError
from tests.support.augment_samples import (
    ALL,
    NOTHING,
    SIZE,
    batch,
    fast_keys,
    keys,
    only,
    run,
    warp_many,
)


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


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_samples_that_draw_nothing_keep_every_bit(dtype):
    images, labels = batch(64)
    images = jnp.asarray(images, dtype)
    warped, warped_labels = run(keys(64), images, labels, AugmentConfig())
    assert warped.dtype == dtype and warped_labels.dtype == labels.dtype
    untouched = np.all(np.asarray(warped == images), axis=(1, 2))
    assert 4 <= untouched.sum() <= 25  # one in five is expected
    np.testing.assert_array_equal(warped_labels[untouched], labels[untouched])


@settings(max_examples=15, deadline=None)
@given(
    classes=st.sets(st.integers(1, 8), min_size=1, max_size=4),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_class_appears_that_was_not_there(classes, seed):
    # Neighboring ids would blend into others under linear interpolation.
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
    # Off center: a label turned the other way would land elsewhere.
    label = np.zeros((8, 96, 96), np.int32)
    label[:, 16:48, 52:80] = 5
    image, warped = run(keys(8), (label > 0).astype(np.float32), label, config)
    bright, labeled = np.asarray(image) > 0.5, np.asarray(warped) == 5
    overlap = 2 * (bright & labeled).sum((1, 2)) / (bright.sum((1, 2)) + labeled.sum((1, 2)))
    assert overlap.min() > 0.97
    moved = 2 * (labeled & (label == 5)).sum((1, 2))
    assert (moved / (labeled.sum((1, 2)) + (label == 5).sum((1, 2)))).min() < 0.93


@settings(max_examples=2, deadline=None)  # each cut compiles two programs
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


both_kinds = pytest.mark.parametrize(
    "config",
    [
        pytest.param(dataclasses.replace(ALL, noise_probability=0.5), id="all"),
        pytest.param(RELEASE, id="release", marks=pytest.mark.slow),
    ],
)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
@both_kinds
def test_result_does_not_depend_on_the_number_of_devices(devices, config):
    images, labels = batch()
    expected = run(keys(8), images, labels, config)
    split = NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec("data"))
    sharded_keys = fast_keys(jax.random.key(0), 0, jax.device_put(np.arange(8), split))
    shards = run(sharded_keys, *jax.device_put((images, labels), split), config)
    for ours in shards:
        assert ours.sharding.is_equivalent_to(split, 3)
    np.testing.assert_array_equal(shards[1], expected[1])
    # Equal bits with AVX2; with AVX-512 a batch of one is rounded otherwise, 3.2e-6 at most.
    np.testing.assert_allclose(shards[0], expected[0], rtol=0, atol=1e-5)


@both_kinds
def test_sharded_augmentation_needs_no_communication(config):
    split = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    arguments = jax.device_put((keys(8), *batch()), split)
    program = run.lower(*arguments, config).compile().as_text()
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
        ({"elastic": "bspline"}, "elastic is 'bspline'; choose spline or gaussian"),
        ({"label_warp": "cubic"}, "label_warp is 'cubic'; choose nearest or linear"),
        ({"noise_sigma": -1}, "noise_sigma"),
        ({"poisson_probability": 2}, "poisson_probability"),
        ({"noise_probability": 0.6, "salt_pepper_probability": 0.5}, "add up to more than 1"),
        ({"salt_pepper_fraction": 1.0}, "salt_pepper_fraction"),
    ],
)
def test_impossible_settings_are_refused_with_the_field_named(fields, word):
    with pytest.raises(UserError, match=word):
        AugmentConfig(**fields)


def test_settings_from_a_list_are_still_a_static_argument():
    assert hash(AugmentConfig(scale_range=[0.8, 1.25])) == hash(AugmentConfig())


def test_the_default_draws_are_pinned():
    """Numbers of the first version: a run of an older checkpoint sees the same pictures."""
    y, x = np.mgrid[:SIZE, :SIZE]
    image = np.tile(((y * 5 + x * 3) % 97 / 96).astype(np.float32), (6, 1, 1))
    label = np.tile((y // 12 + x // 16) % 9, (6, 1, 1)).astype(np.int32)
    config = AugmentConfig(noise_probability=0.3)
    warped, ids = map(np.asarray, run(keys(6, step=3, seed=11), image, label, config))
    pixel = [0.74262375, 0.93104553, 0.78125, 0.7449227, 0.7443286, 0.6248389]
    mean = [0.32709837, 0.44575617, 0.49664986, 0.48032787, 0.4914873, 0.43905476]
    np.testing.assert_allclose(warped[:, 17, 29], pixel, atol=1e-5)
    np.testing.assert_allclose(warped.mean((1, 2)), mean, atol=1e-6)
    assert ids.sum((1, 2)).tolist() == [3610, 5120, 5760, 5570, 5669, 5050]


LINEAR = AugmentConfig(**NOTHING | {"elastic_probability": 0.5, "label_warp": "linear"})


@pytest.mark.parametrize("elastic", ["spline", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_linear_label_warp_invents_classes_where_a_sample_is_elastic(elastic):
    label = np.zeros((16, SIZE, SIZE), np.int32)
    label[:, 12:30, 10:35] = 8
    image = label.astype(np.float32) / 8
    config = dataclasses.replace(LINEAR, elastic=elastic)
    warped, linear = map(np.asarray, run(keys(16), image, label, config))
    _, nearest = run(keys(16), image, label, dataclasses.replace(config, label_warp="nearest"))
    assert set(np.unique(nearest)) == {0, 8}
    invented = ((linear > 0) & (linear < 8)).any((1, 2))
    still = (warped == image).all((1, 2))
    np.testing.assert_array_equal(invented, ~still)
    assert 3 <= still.sum() <= 13
    np.testing.assert_array_equal(linear[still], label[still])


def test_linear_label_warp_rounds_as_scipy_does_for_bytes():
    images, labels = batch(4)
    config = dataclasses.replace(LINEAR, elastic_probability=1.0)
    _, linear = run(keys(4), images, labels, config)
    places = warp_many(
        jax.vmap(lambda key: jax.random.split(key)[0])(keys(4)), (SIZE, SIZE), config
    )
    read = partial(ndimage.map_coordinates, order=1, mode="grid-constant")
    for n in range(4):
        exact = read(labels[n].astype(float), places[n])
        clear = np.abs(exact % 1 - 0.5) > 1e-4
        expected = read(labels[n].astype(np.uint8), places[n])
        np.testing.assert_array_equal(np.asarray(linear[n])[clear], expected[clear])
        assert clear.mean() > 0.99


def test_release_keeps_values_and_classes_in_range():
    images, labels = batch(64)
    labels = np.where(labels > 4, 7, 2).astype(np.int32)
    warped, ids = map(np.asarray, run(keys(64), images, labels, RELEASE))
    assert warped.dtype == np.float32 and ids.dtype == labels.dtype
    assert np.isfinite(warped).all() and warped.min() >= 0 and warped.max() <= 1
    assert set(np.unique(ids)) <= {0, 2, 7}
    untouched = (ids == labels).all((1, 2))
    assert 4 <= untouched.sum() <= 25


def test_release_settings_pass_through_a_configuration():
    config = default_config()
    config.augment.update(dataclasses.asdict(RELEASE))
    assert AugmentConfig(**from_json(to_json(config)).augment) == RELEASE
    assert sum(RELEASE.geometric) == pytest.approx(0.8)
    assert sum(RELEASE.noises) == pytest.approx(0.6)


def test_seed_of_the_augmentation():
    assert augmentation_seed(5, AugmentConfig()) == 5
    drawn = {augmentation_seed(5, AugmentConfig(seeded=False)) for _ in range(3)}
    assert len(drawn) == 3 and all(0 <= seed < 2**31 for seed in drawn)
