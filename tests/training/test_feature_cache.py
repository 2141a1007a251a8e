"""Encoding the few-shot set beforehand changes when the encoder runs, and no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from pgpsam_jax.config import default_config, use_small_encoder
from pgpsam_jax.data.augmentation.augment import augment, sample_keys
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.models.segmenter import METHODS, Training
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import feature_cache, train_state
from pgpsam_jax.training import train_step as steps
from pgpsam_jax.training.device_batches import DeviceBatches
from pgpsam_jax.training.plan import TrainingPlan
from tests.support import micro, tiny_method

SLICES, SIDE, BATCH, CLASSES, SEED = 5, 32, 2, 3, 3


@pytest.fixture(
    scope="module",
    params=["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("samed", "pgpsam"))],
)
def configuration(request):
    with tiny_method.known():
        yield functools.partial(configured, request.param)


def configured(method: str, copies: int, augmented: bool) -> ConfigDict:
    config = default_config()
    use_small_encoder(config)
    config.model.name, config.model.train_encoder = method, "frozen"
    config.model.encoder, config.model.image_size = micro.NAME, SIDE
    config.eval.batch_size, config.train.batch_size = 2, BATCH
    config.train.encoded_copies, config.train.steps = copies, 10
    for kind in ("rotate", "scale", "elastic"):
        if not augmented:
            config.augment[f"{kind}_probability"] = 0.0
    return config


@pytest.fixture(scope="module")
def few_shot_set():
    rng = np.random.default_rng(0)
    images = rng.random((SLICES, SIDE, SIDE)).astype(np.float16)
    return images, (2 * images).astype(np.uint8) % CLASSES


@pytest.fixture(scope="module")
def model(configuration):
    return build.init_model(configuration(0, False).model, CLASSES, 0)[:3]


@pytest.fixture(scope="module")
def encoded(configuration, few_shot_set, model):
    """Two copies of the set, not augmented, and the one device they are for."""
    mesh = device_mesh.make_mesh(devices=jax.devices()[:1])
    return feature_cache.encode_few_shot_set(
        TrainingPlan.from_config(configuration(2, False)).step,
        mesh,
        model,
        *few_shot_set,
        seed=SEED,
    )


@pytest.fixture(scope="module")
def step_on(configuration, model):
    """f(copies, set, rows[, number]) -> (state, metrics) of a step from the start, or a later."""

    @functools.cache
    def compiled(copies):
        config = configuration(copies, False)
        optimizer = optax.flatten(
            TrainingPlan.from_config(config).make_optimizer(SLICES)
        )  # compiles in half the time
        state = train_state.init_state(model[1], optimizer, seed=SEED, epoch_size=SLICES)
        settings = TrainingPlan.from_config(config).step
        return state, jax.jit(steps.make_train_step(model[0], optimizer, settings))

    def run(copies, given, rows, number=0):
        state, step = compiled(copies)
        mesh = device_mesh.make_mesh(devices=jax.devices()[:1])
        feed = DeviceBatches(given, iter([np.array(rows, np.int32)]), mesh, 1e9)
        state = dataclasses.replace(state, step=jnp.array(number, jnp.int32))
        return step(state, model[2], next(feed)[0])

    return run


def test_a_step_on_encoded_slices_is_the_step_on_slices(few_shot_set, model, encoded, step_on):
    """To rounding: the encoder is compiled for another batch. Measured 1e-6.

    First moments after the step are its gradients, a tenth of them.
    """
    images, labels = few_shot_set
    plain, got = (
        step_on(copies, given, [3, 1])
        for copies, given in ((0, {"image": images, "label": labels}), (2, encoded))
    )
    np.testing.assert_allclose(got[1]["loss"], plain[1]["loss"], rtol=1e-5)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(model[1])])[:-1]
    moments, wanted = (
        np.split(np.asarray(optax.tree.get(state.opt_state, "mu")), ends)
        for state, _ in (got, plain)
    )
    sizes = [float(np.abs(leaf).max()) for leaf in wanted]
    for a, b, size in zip(moments, wanted, sizes, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * max(size, 1e-3 * max(sizes)))


def test_copies_are_the_augmented_slices(configuration, few_shot_set, model):
    """Copy c of slice n is augmented by the keys of step c and place n, on any devices."""
    images, labels = few_shot_set
    step, found = TrainingPlan.from_config(configuration(2, True)).step, []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = device_mesh.make_mesh(devices=devices)
        found.append(
            feature_cache.encode_few_shot_set(step, mesh, model, images, labels, seed=SEED)
        )
    assert found[0]["label"].shape == (2 * SLICES, SIDE, SIDE)
    augmented = jax.jit(lambda *arguments: augment(*arguments, step.augment))
    for copy in range(2):
        keys = sample_keys(jax.random.key(SEED), copy, jnp.arange(SLICES))
        _, wanted = augmented(keys, jnp.asarray(images, jnp.float32), jnp.asarray(labels))
        part = found[0]["label"][copy * SLICES : (copy + 1) * SLICES]
        assert (part == wanted).mean() > 0.999  # a compiled warp may round another pixel's way
    np.testing.assert_array_equal(found[0]["label"], found[1]["label"])
    for one, other in zip(*(jax.tree.leaves(each["encoded"]) for each in found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def entropy(metrics) -> float:
    """Of the only output, or the last."""
    return float(metrics.get("ce", metrics.get("final_ce")))


def test_epochs_take_the_copies_in_turn(encoded, step_on):
    """Rows of the second epoch come from the second copy: made all zero, its loss shows."""
    labels, rows = encoded["label"].copy(), np.arange(BATCH)
    labels[SLICES:] = 0
    given = encoded | {"label": labels}
    # Step 3 of two slices each is in the second epoch of five.
    losses = [entropy(step_on(2, given, rows, first)[1]) for first in (0, 3)]
    other = encoded | {"label": np.zeros_like(labels)}
    zero = entropy(step_on(2, other, rows)[1])
    assert losses[1] == pytest.approx(zero, rel=1e-5) and abs(losses[0] - zero) > 1e-3


def test_what_takes_too_much_is_refused(configuration, few_shot_set, model):
    step = TrainingPlan.from_config(configuration(1, False)).step
    with pytest.raises(UserError, match=r"raise it, or lower train\.encoded_copies"):
        feature_cache.encode_few_shot_set(
            step, device_mesh.make_mesh(), model, *few_shot_set, seed=SEED, resident_gib=1e-6
        )


# What has no SAM has no frozen encoder.
FROZEN = [k for k, m in METHODS.items() if m.training is Training.SGD and m.base_tensors]


@pytest.mark.parametrize("key", FROZEN)
def test_every_trained_method_has_features_to_keep(key):
    """By shapes: what a frozen encoder gives is all that the rest of the method needs."""
    settings = configured(key[0], 1, False).model
    settings.preset = key[1] or settings.preset
    graphdef, *states = build.abstract_model(settings, CLASSES)

    def outputs(states, images):
        model = nnx.merge(graphdef, *states)
        return model(images), model.segment(model.encode(images))

    image = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.float32)
    whole, parts = jax.eval_shape(outputs, states, image)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, parts)
