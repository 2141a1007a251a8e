"""The pure step: what it changes, what it leaves, how it takes its batch."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgpsam_jax.methods import build
from pgpsam_jax.models import parameters
from pgpsam_jax.models.initializers import kernel_init
from pgpsam_jax.models.sam.image_encoder import ImageEncoder
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.train_state import init_state
from pgpsam_jax.training.train_step import gradients_of, make_train_step
from tests.support import tiny_method
from tests.support.faults import NOISE
from tests.support.small_run import config_for

CLASSES, SIZE, BATCH = 3, 32, 8


class Adapted(tiny_method.Tiny):
    """SAM's encoder with LoRA under the tiny method's heads: the step is the same."""

    def __init__(self, sam, num_classes, *, lora, dtype, rngs):
        super().__init__(sam, num_classes, rngs=rngs)
        self.image_encoder = ImageEncoder(sam.encoder, lora, rngs=rngs)
        self.first, self.second = (
            nnx.Linear(sam.encoder.out_channels, num_classes, kernel_init=kernel_init, rngs=rngs)
            for _ in range(2)
        )

    def encode(self, images):
        return self.image_encoder(images)[0]


@pytest.fixture(scope="module")
def lora_config():
    with tiny_method.known(Adapted, ("adapted", "")):
        own = {"model__name": "adapted", "model__patch_size": 4}
        yield config_for(Path(), model__train_encoder="lora", train__steps=40, **own, **NOISE)


@pytest.fixture(scope="module")
def tiny():
    """The method of which the step's own parts are looked at."""
    with tiny_method.known():
        yield start(config_for(Path(), model__name=tiny_method.NAME, **NOISE))


@pytest.fixture(scope="module")
def batch():
    """Learnable squares."""
    rng = np.random.default_rng(0)
    label = np.zeros((BATCH, SIZE, SIZE), np.uint8)
    for i in range(BATCH):
        y, x = rng.integers(2, 16, 2)
        label[i, y : y + 10, x : x + 10] = 1 + i % 2
    image = (0.2 + 0.3 * label + 0.02 * rng.standard_normal(label.shape)).astype(np.float16)
    return {"image": image, "label": label}


def start(config):
    """(graphdef, settings of the step, step, state, frozen) of a model as it is drawn."""
    graphdef, params, frozen, _ = build.init_model(config.model, CLASSES, config.seed)
    optimizer, settings = (
        TrainingPlan.from_config(config).make_optimizer(BATCH),
        TrainingPlan.from_config(config).step,
    )
    step = make_train_step(graphdef, optimizer, settings)
    return graphdef, settings, step, init_state(params, optimizer, seed=0, epoch_size=BATCH), frozen


@pytest.fixture(scope="module")
def lora_run(lora_config, batch):
    """(compiled step, makes a state, frozen, batch) on one device, with explicit shardings."""
    _, _, step, state, frozen = start(lora_config)
    mesh = device_mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    states = device_mesh.state_shardings(state, mesh), device_mesh.state_shardings(frozen, mesh)
    compiled = jax.jit(
        step,
        in_shardings=(*states, device_mesh.batch_sharding(mesh)),
        out_shardings=(states[0], device_mesh.replicated(mesh)),
        donate_argnums=0,
    )

    def fresh():
        """A copy: the step takes its state over."""
        return jax.device_put(jax.tree.map(jnp.copy, state), states[0])

    return compiled, fresh, jax.device_put(frozen, states[1]), device_mesh.put_batch(batch, mesh)


def test_only_the_filter_trains_and_the_loss_falls(lora_run):
    step, fresh, frozen, batch = lora_run
    state = fresh()
    before = {k: np.asarray(v[...]) for k, v in parameters.flat_paths(state.params).items()}
    assert not set(before) & set(parameters.flat_paths(frozen))
    encoder = {path for path in before if path.startswith("image_encoder")}
    assert encoder == {
        f"image_encoder/blocks/{i}/attn/lora/{part}" for i in range(2) for part in "ab"
    }
    moments = jax.tree.leaves(state.opt_state[0][0].mu)
    assert sum(m.size for m in moments) == sum(v.size for v in before.values())
    losses = []
    with jax.transfer_guard("disallow"):
        for _ in range(25):
            state, metrics = step(state, frozen, batch)
            losses.append(jax.device_get(metrics["loss"]))
    assert step._cache_size() == 1  # no retrace
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    after = parameters.flat_paths(state.params)
    still = [k for k, v in before.items() if np.array_equal(v, np.asarray(after[k][...]))]
    assert still == []
    assert int(state.step) == 25


def test_donated_state_is_written_in_place(lora_run):
    """Every byte of the state but what rounding to whole blocks leaves is reused."""
    step, fresh, frozen, batch = lora_run
    state = fresh()
    memory = step.lower(state, frozen, batch).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= 0.99 * size


def test_rows_of_a_resident_set_are_the_same_batch(tiny, batch):
    """The set lies on the device in another order; the step picks the batch out of it."""
    _, _, step, state, frozen = tiny
    step, order = jax.jit(step), np.random.default_rng(1).permutation(BATCH).astype(np.int32)
    whole = {name: array[order] for name, array in batch.items()}
    _, wanted = step(state, frozen, batch)
    _, metrics = step(state, frozen, whole | {"rows": np.argsort(order).astype(np.int32)})
    for name, value in wanted.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_microbatches_average_the_gradients_of_their_parts(tiny, batch):
    """Every third row is a part: a batch split over devices keeps its rows where they are."""
    graphdef, settings, _, state, frozen = tiny
    images, labels = np.float32(batch["image"][:6]), np.int32(batch["label"][:6])
    of = jax.jit(gradients_of, static_argnums=(0, 6))

    def gradients(images, labels, parts):
        config = dataclasses.replace(settings, microbatches=parts)
        return of(graphdef, state.params, frozen, images, labels, 0, config)

    apart = [gradients(images[i::3], labels[i::3], 1) for i in range(3)]
    wanted = jax.tree.map(lambda *leaves: sum(leaves) / 3, *apart)
    got = gradients(images, labels, 3)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_frozen_weights_have_no_gradient_products(lora_config):
    """What LoRA saves against full training: the dW of every frozen kernel of the encoder."""

    def flops(mode):
        config = lora_config.copy_and_resolve_references()
        config.model.train_encoder = mode
        graphdef, params, frozen = build.abstract_model(config.model, CLASSES)
        encoder = nnx.merge(graphdef, params, frozen).image_encoder
        trained = {"full": nnx.Param, "lora": nnx.LoRAParam}[mode]
        graphdef, params, frozen = nnx.split(encoder, trained, ...)

        def loss(params, frozen, images):
            return jnp.square(nnx.merge(graphdef, params, frozen)(images)[0]).sum()

        images = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
        lowered = jax.jit(jax.grad(loss)).lower(params, frozen, images)
        return lowered.cost_analysis()["flops"], encoder.config

    full, sizes = flops("full")
    lora, _ = flops("lora")
    tokens, d, c = BATCH * sizes.grid[0] * sizes.grid[1], sizes.width, sizes.out_channels
    blocks = 2 * tokens * 12 * d * d * sizes.depth
    ends = 2 * tokens * (3 * sizes.patch_size**2 * d + d * c + 9 * c * c)
    first = 2 * tokens * 3 * d * d  # nothing trains below the first block: no dX either
    adapters = 2 * tokens * 2 * 3 * 2 * 4 * d * sizes.depth  # q and v, rank 4, three products
    assert full - lora == pytest.approx(blocks + ends + first - adapters, rel=0.05)
