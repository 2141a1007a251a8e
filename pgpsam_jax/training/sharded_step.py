"""The training step of a configuration on a mesh: what loop, benchmark and compile-only share."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgpsam_jax.methods import registry
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import from_config
from pgpsam_jax.training.train_state import init_state


class ShardedStep(NamedTuple):
    """Jitted functions, and shapes with shardings of the trees they take.

    run(state, frozen, batch) -> (state, metrics), which takes over the state it is given.
    start(params) -> state, before the first step.
    """

    run: Callable
    start: Callable
    state: object
    frozen: object
    batch: dict

    def trace(self) -> jax.stages.Traced:
        """`run`, traced for its shapes."""
        return self.run.trace(self.state, self.frozen, self.batch)

    def lower(self) -> jax.stages.Lowered:
        return self.trace().lower()


def shard_step(
    config: ConfigDict, mesh: Mesh, graphdef, params, frozen, batch: dict, *, epoch_size, seed: int
) -> ShardedStep:
    """The step for a model's states (arrays or shapes) and the shapes, with shardings, of a batch.

    epoch_size: slices of the few-shot set. seed: of augmentation.
    """
    optimizer = from_config.optimizer_of(config, epoch_size)
    start = functools.partial(init_state, optimizer=optimizer, seed=seed, epoch_size=epoch_size)
    method = registry.key_of(config.model)
    state = _placed(jax.eval_shape(start, params), mesh, method)
    frozen = _placed(frozen, mesh, method)
    step = from_config.make_step(config, graphdef, optimizer)
    shardings = [sharding_of(tree) for tree in (state, frozen, batch)]
    run = jax.jit(
        device_mesh.over_mesh(step, mesh),
        in_shardings=tuple(shardings),
        out_shardings=(shardings[0], device_mesh.replicated(mesh)),
        donate_argnums=0,
    )
    start = jax.jit(start, out_shardings=shardings[0])
    return ShardedStep(run, start, state, frozen, batch)


def sharding_of(tree):
    """The shardings of a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _placed(tree, mesh: Mesh, method):
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        tree,
        device_mesh.state_shardings(tree, mesh, method),
    )
