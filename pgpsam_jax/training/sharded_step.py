"""Shards the train step over a mesh, for train loop, benchmark and ahead-of-time compiler."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from pgpsam_jax.distributed import multihost
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.train_state import TrainState, init_state


class ShardedStep(NamedTuple):
    """Jitted functions, and the shapes and shardings of their arguments.

    Attributes:
      run: (state, frozen, batch) -> (state, metrics); donates the state.
      start: params -> state before the first step; parameters already on the mesh are not copied,
        so the first step donates them.
      state, frozen, batch: shapes with shardings.
    """

    run: jax.stages.Wrapped
    start: Callable[[nnx.State], TrainState]
    state: TrainState
    frozen: nnx.State
    batch: dict

    def trace(self) -> jax.stages.Traced:
        """Traces `run` for its shapes."""
        return self.run.trace(self.state, self.frozen, self.batch)

    def lower(self) -> jax.stages.Lowered:
        return self.trace().lower()


def shard_step(
    plan: TrainingPlan, mesh: Mesh, graphdef, params, frozen, batch: dict, *, epoch_size, seed: int
) -> ShardedStep:
    """Shards the train step of a plan over a mesh.

    Args:
      plan: how the run trains.
      mesh: the devices.
      graphdef, params, frozen: the model, arrays or shapes.
      batch: shapes with shardings of a batch.
      epoch_size: slices of the few-shot set.
      seed: of augmentation.
    """
    optimizer = plan.make_optimizer(epoch_size)
    init = functools.partial(init_state, optimizer=optimizer, seed=seed, epoch_size=epoch_size)
    state = _placed(jax.eval_shape(init, params), mesh, plan.method)
    frozen = _placed(frozen, mesh, plan.method)
    step = plan.make_step(graphdef, optimizer)
    shardings = [sharding_of(tree) for tree in (state, frozen, batch)]
    run = jax.jit(
        device_mesh.traced_on(mesh)(step),
        in_shardings=tuple(shardings),
        out_shardings=(shardings[0], device_mesh.replicated(mesh)),
        donate_argnums=0,
    )
    others = jax.jit(
        lambda params: dataclasses.replace(init(params), params=nnx.State({})),
        out_shardings=dataclasses.replace(shardings[0], params=nnx.State({})),
    )

    def start(params):
        params = multihost.put_global(params, shardings[0].params)
        return dataclasses.replace(others(params), params=params)

    return ShardedStep(run, start, state, frozen, batch)


def sharding_of(tree):
    """Returns the shardings of a tree of arrays or shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _placed(tree, mesh: Mesh, method):
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        tree,
        device_mesh.state_shardings(tree, mesh, method),
    )
