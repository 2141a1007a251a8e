"""Encoding the few-shot set beforehand changes when the encoder runs, and no number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from pgpsam_jax import build, encodings, sharding
from pgpsam_jax import step as steps
from pgpsam_jax.config import default_config, use_small_encoder
from pgpsam_jax.data.augment import augment, sample_keys
from pgpsam_jax.errors import UserError
from pgpsam_jax.feed import Feed

SLICES, SIDE, BATCH, CLASSES, SEED = 5, 64, 2, 3, 3


def configuration(copies: int, augmented: bool) -> ConfigDict:
    config = default_config()
    use_small_encoder(config)
    config.model.name, config.model.train_encoder, config.model.image_size = "samed", "frozen", SIDE
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
def model():
    return build.init_model(configuration(0, False), CLASSES)[:3]


def one_step(config, model, batch):
    """Loss and first moments after a step on a batch: its gradients, a tenth of them."""
    graphdef, params, frozen = model
    optimizer = build.optimizer_of(config, SLICES)
    state = steps.init_state(params, optimizer, seed=SEED, epoch_size=SLICES)
    run = jax.jit(steps.make_train_step(graphdef, optimizer, build.step_config(config)))
    state, metrics = run(state, frozen, batch)
    return metrics["loss"], jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))


def test_a_step_on_encoded_slices_is_the_step_on_slices(few_shot_set, model):
    """To rounding: the encoder is compiled for another batch. Measured 1e-6."""
    images, labels = few_shot_set
    rows = jnp.array([3, 1])
    plain = {"image": jnp.asarray(images), "label": jnp.asarray(labels), "rows": rows}
    wanted = one_step(configuration(0, False), model, plain)
    config = configuration(1, False)
    encoded = encodings.encoded_set(config, sharding.make_mesh(), model, *few_shot_set, seed=SEED)
    got = one_step(config, model, jax.tree.map(jnp.asarray, encoded) | {"rows": rows})
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    sizes = [float(jnp.abs(leaf).max()) for leaf in wanted[1]]
    for a, b, size in zip(got[1], wanted[1], sizes, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * max(size, 1e-3 * max(sizes)))


def test_copies_are_the_augmented_slices(few_shot_set, model):
    """Copy c of slice n is augmented by the keys of step c and place n, on any devices."""
    images, labels = few_shot_set
    config, found = configuration(2, True), []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.make_mesh(devices=devices)
        found.append(encodings.encoded_set(config, mesh, model, images, labels, seed=SEED))
    assert found[0]["label"].shape == (2 * SLICES, SIDE, SIDE)
    for copy in range(2):
        keys = sample_keys(jax.random.key(SEED), copy, jnp.arange(SLICES))
        settings = build.step_config(config).augment
        _, wanted = augment(keys, jnp.asarray(images, jnp.float32), jnp.asarray(labels), settings)
        part = found[0]["label"][copy * SLICES : (copy + 1) * SLICES]
        assert (part == wanted).mean() > 0.999  # a compiled warp may round another pixel's way
    np.testing.assert_array_equal(found[0]["label"], found[1]["label"])
    np.testing.assert_allclose(found[0]["encoded"], found[1]["encoded"], atol=1e-4)


def test_epochs_take_the_copies_in_turn(few_shot_set, model):
    """Rows of the second epoch come from the second copy: made all zero, its loss shows."""
    config = configuration(2, False)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    encoded = encodings.encoded_set(config, mesh, model, *few_shot_set, seed=SEED)
    encoded["label"][SLICES:] = 0
    graphdef, params, frozen = model
    optimizer = build.optimizer_of(config, SLICES)
    run = jax.jit(steps.make_train_step(graphdef, optimizer, build.step_config(config)))
    feed = Feed(encoded, iter([np.arange(BATCH, dtype=np.int32)] * 2), mesh, 1e9)
    losses = []
    for first in (0, 3):  # step 3 of two slices each is in the second epoch of five
        state = steps.init_state(params, optimizer, seed=SEED, epoch_size=SLICES)
        state.step = jnp.array(first, jnp.int32)
        losses.append(float(run(state, frozen, next(feed)[0])[1]["ce"]))
    other = encoded | {"label": np.zeros_like(encoded["label"])}
    state = steps.init_state(params, optimizer, seed=SEED, epoch_size=SLICES)
    rows = {"rows": jnp.arange(BATCH)}
    zero = float(run(state, frozen, jax.tree.map(jnp.asarray, other) | rows)[1]["ce"])
    assert losses[1] == pytest.approx(zero, rel=1e-5) and abs(losses[0] - zero) > 1e-3


def test_what_takes_too_much_is_refused(few_shot_set, model):
    config = configuration(1, False)
    config.data.resident_gib = 1e-6
    with pytest.raises(UserError, match=r"raise that, or lower train\.encoded_copies"):
        encodings.encoded_set(config, sharding.make_mesh(), model, *few_shot_set, seed=SEED)
