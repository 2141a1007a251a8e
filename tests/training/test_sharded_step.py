"""The step as a run compiles it: its memory is reused, and every step draws anew."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgpsam_jax.distributed.multihost import put_global
from pgpsam_jax.methods import build
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.sharded_step import shard_step, sharding_of
from tests.support import tiny_method
from tests.support.method_runs import SIZE, small_config
from tests.support.small_run import config_for

CLASSES, BATCH = 3, 8


@pytest.fixture(scope="module")
def run():
    """(step, its parameters and frozen weights, a batch on the mesh)."""
    with tiny_method.known():
        config = config_for(Path(), model__name=tiny_method.NAME)
        mesh, size = device_mesh.make_mesh(), config.model.image_size
        rng = np.random.default_rng(0)
        batch = {
            "image": jnp.asarray(rng.random((BATCH, size, size)), jnp.float32),
            "label": jnp.asarray(rng.integers(0, CLASSES, (BATCH, size, size)), jnp.uint8),
        }
        batch = put_global(batch, device_mesh.batch_sharding(mesh))
        graphdef, params, frozen, _ = build.init_model(config.model, CLASSES, config.seed)
        step = shard_step(
            TrainingPlan.from_config(config),
            mesh,
            graphdef,
            params,
            frozen,
            batch,
            epoch_size=10**6,
            seed=3,
        )
        yield step, params, put_global(frozen, sharding_of(step.frozen)), batch


def test_the_state_is_donated_and_nothing_else(run):
    (state, frozen, batch), _ = run[0].lower().args_info
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    assert not any(leaf.donated for leaf in jax.tree.leaves((frozen, batch)))


def test_every_step_augments_in_its_own_way(run):
    """The same parameters see the same slices otherwise in the next step, and alike again."""
    step, params, frozen, batch = run
    losses = []
    for number in (0, 1, 0):
        state = step.start(jax.tree.map(jnp.copy, params))  # which the step donates
        state = dataclasses.replace(state, step=state.step + number)
        losses.append(float(step.run(state, frozen, batch)[1]["loss"]))
    assert losses[0] == losses[2] != losses[1]


def test_the_seed_of_a_run_is_that_of_its_augmentation(run):
    step, params, *_ = run
    assert int(step.start(params).seed) == 3


def test_frozen_weights_lie_in_parts():
    """Every one that is large; by shapes alone. So do the trained ones and their moments."""
    config = small_config("samed")
    mesh = device_mesh.make_mesh(data=1, fsdp=8)
    graphdef, *states = build.abstract_model(config.model, CLASSES)
    batch = {
        name: jax.ShapeDtypeStruct(
            (8, SIZE, SIZE), dtype, sharding=device_mesh.batch_sharding(mesh)
        )
        for name, dtype in (("image", jnp.float16), ("label", jnp.uint8))
    }
    step = shard_step(
        TrainingPlan.from_config(config), mesh, graphdef, *states, batch, epoch_size=8, seed=0
    )
    for tree in (step.frozen, step.state.params, step.state.opt_state):
        large = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 1024]
        assert len(large) >= 4
        assert not [leaf.shape for leaf in large if leaf.sharding.is_fully_replicated]
