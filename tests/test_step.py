"""The pure step: what it changes, what it leaves, and the same numbers on any mesh."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import config_for, write_data

from pgpsam_jax import build, parameters, sharding
from pgpsam_jax.errors import UserError
from pgpsam_jax.step import init_state, make_train_step

CLASSES, SIZE, BATCH = 3, 32, 8


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A LoRA model with its state, optimiser and a fixed batch of learnable squares."""
    root = write_data(tmp_path_factory.mktemp("data"))
    config = config_for(root, model__train_encoder="lora", train__steps=40)
    graphdef, params, frozen, _ = build.init_model(config, CLASSES)
    rng = np.random.default_rng(0)
    label = np.zeros((BATCH, SIZE, SIZE), np.uint8)
    for i in range(BATCH):
        y, x = rng.integers(2, 16, 2)
        label[i, y : y + 10, x : x + 10] = 1 + i % 2
    image = (0.2 + 0.3 * label + 0.02 * rng.standard_normal(label.shape)).astype(np.float16)
    optimizer = build.optimizer_of(config, BATCH)
    step = make_train_step(graphdef, optimizer, build.step_config(config))
    state = init_state(params, optimizer, seed=0, epoch_size=BATCH)
    return step, state, frozen, {"image": image, "label": label}


def on_mesh(run, **sizes):
    """(compiled step, state, frozen, batch) with explicit shardings."""
    step, state, frozen, batch = run
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:count])
    states = sharding.state_shardings(state, mesh), sharding.state_shardings(frozen, mesh)
    compiled = jax.jit(
        step,
        in_shardings=(*states, sharding.batch_sharding(mesh)),
        out_shardings=(states[0], sharding.replicated(mesh)),
        donate_argnums=0,
    )
    # A copy: the step takes its state over.
    state = jax.device_put(jax.tree.map(jnp.copy, state), states[0])
    return compiled, state, jax.device_put(frozen, states[1]), sharding.put_batch(batch, mesh)


def test_only_the_filter_trains_and_the_loss_falls(lora_run):
    step, state, frozen, batch = on_mesh(lora_run, data=1, fsdp=1, tensor=1)
    before = {k: np.asarray(v[...]) for k, v in parameters.flat_paths(state.params).items()}
    assert not set(before) & set(parameters.flat_paths(frozen))
    encoder = {path for path in before if path.startswith("image_encoder")}
    assert encoder == {
        f"image_encoder/blocks/{i}/attn/lora/{part}" for i in range(4) for part in "ab"
    }
    moments = jax.tree.leaves(state.opt_state[0][0].mu)
    assert sum(m.size for m in moments) == sum(v.size for v in before.values())
    losses = []
    for _ in range(25):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1  # no retrace
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    after = parameters.flat_paths(state.params)
    still = [k for k, v in before.items() if np.array_equal(v, np.asarray(after[k][...]))]
    assert still == []
    assert int(state.step) == 25


@pytest.mark.parametrize(
    "sizes",
    [dict(data=8, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=2)],
    ids=lambda sizes: "x".join(map(str, sizes.values())),
)
def test_meshes_agree_with_one_device(lora_run, sizes, one_device_steps):
    step, state, frozen, batch = on_mesh(lora_run, **sizes)
    for wanted in one_device_steps:
        state, metrics = step(state, frozen, batch)
        for name, value in wanted.items():
            np.testing.assert_allclose(float(metrics[name]), value, rtol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def one_device_steps(lora_run):
    step, state, frozen, batch = on_mesh(lora_run, data=1, fsdp=1, tensor=1)
    records = []
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        records.append({k: float(v) for k, v in metrics.items()})
    return records


def specs(config, classes=9):
    """Path -> PartitionSpec on a (2, 2, 2) mesh, for every leaf that is not replicated."""
    _, params, frozen = build.abstract_model(config, classes)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    leaves = parameters.flat_paths(params) | parameters.flat_paths(frozen)
    found = {path: sharding.spec_of(path, leaf.shape, mesh) for path, leaf in leaves.items()}
    return {path: list(spec) for path, spec in sorted(found.items()) if any(spec)}


def test_shardings_are_pinned(tmp_path):
    """`sharding_vit_b.json` changes only on purpose: rewrite it from `specs` when rules change."""
    from pgpsam_jax.config import default_config

    pinned = Path(__file__).with_name("sharding_vit_b.json")
    assert specs(default_config()) == json.loads(pinned.read_text())


def test_state_shardings_follow_the_parameter(lora_run):
    _, state, _, _ = lora_run
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.state_shardings(state, mesh)
    path = "mask_decoder/transformer/layers/0/mlp/lin1/kernel"
    for tree in (placed.params, placed.opt_state[0][0].mu, placed.opt_state[0][0].nu):
        leaf = parameters.flat_paths(tree)[path]
        assert leaf.get_value().spec == jax.P("fsdp", "tensor")


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (16, 1, 1), (0, 1, 1)])
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices; the product must be 8"):
        sharding.make_mesh(*sizes)


def test_the_rest_of_the_devices():
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
