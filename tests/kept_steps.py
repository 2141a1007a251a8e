"""Runs of one process that train the same thing trace and compile its step once."""

import contextlib
import copy
import json
from unittest import mock

import jax

from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.training import metric_logger, step_cost, train

_NO_PART = ("data", "log", "eval", "validation", "name")  # of what a step computes


@contextlib.contextmanager
def kept(draws=False):
    """Inside the block, a step of the same settings, model and shapes is the one made before.

    What it costs is counted once, and no learning curve is drawn unless it is looked at.
    """
    make, made, count, counted = train.shard_step, {}, step_cost.of_step, {}
    draw = metric_logger.RunLog._draw if draws else lambda self: None

    def shard_step(config, mesh, graphdef, params, frozen, batch, **numbers):
        settings = {k: v for k, v in configuration.to_json(config).items() if k not in _NO_PART}
        leaves, tree = jax.tree.flatten((params, frozen, batch))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = json.dumps([settings, numbers], sort_keys=True), mesh, graphdef, tree, shapes
        if key not in made:
            made[key] = make(config, mesh, graphdef, params, frozen, batch, **numbers)
        return made[key]

    def of_step(config, mesh, graphdef, run, *others):
        if run not in counted:
            counted[run] = count(config, mesh, graphdef, run, *others)
        return copy.deepcopy(counted[run])

    with (
        mock.patch.object(train, "shard_step", shard_step),
        mock.patch.object(step_cost, "of_step", of_step),
        mock.patch.object(metric_logger.RunLog, "_draw", draw),
    ):
        yield
