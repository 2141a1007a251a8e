"""Runs of one process that train the same thing trace and compile its step once."""

import contextlib
import copy
from unittest import mock

import jax

from pgpsam_jax.training import metric_logger, step_cost, train


@contextlib.contextmanager
def kept(draws=False):
    """Inside the block, a step of the same settings, model and shapes is the one made before.

    What it costs is counted once, and no learning curve is drawn unless it is looked at.
    """
    make, made, count, counted = train.shard_step, {}, step_cost.describe_step, {}
    draw = metric_logger.MetricLogger._draw if draws else lambda self: None

    def shard_step(plan, mesh, graphdef, params, frozen, batch, **numbers):
        leaves, tree = jax.tree.flatten((params, frozen, batch))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = plan, *sorted(numbers.items()), mesh, graphdef, tree, shapes
        if key not in made:
            made[key] = make(plan, mesh, graphdef, params, frozen, batch, **numbers)
        return made[key]

    def describe_step(settings, mesh, graphdef, run, *others):
        if run not in counted:
            counted[run] = count(settings, mesh, graphdef, run, *others)
        return copy.deepcopy(counted[run])

    with (
        mock.patch.object(train, "shard_step", shard_step),
        mock.patch.object(step_cost, "describe_step", describe_step),
        mock.patch.object(metric_logger.MetricLogger, "_draw", draw),
    ):
        yield
