"""Everything that can be refused before the first step."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import (
    best_parameters,
    frozen_weights,
    resumption,
)
from pgpsam_jax.checkpointing.provenance import provenance
from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.data import dataset
from pgpsam_jax.data.quality import appearance, verification
from pgpsam_jax.distributed import multihost
from pgpsam_jax.methods import build, pretrained
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.runtime import worker_pool
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import from_config, model_selection, startup_summary
from pgpsam_jax.training.resume import is_resume
from pgpsam_jax.training.timer import Stopwatch
from pgpsam_jax.utils.files import write_json


@dataclasses.dataclass
class Run:
    """What a run has before its first step.

    data: few-shot slices; held_out: those of validation, or None; total: steps of the whole run;
    model: (graphdef, params, frozen) at the start, until training takes it over.
    """

    config: ConfigDict
    workdir: Path
    watch: Stopwatch
    mesh: Mesh
    split: dataset.Split
    data: dataset.FewShotData
    held_out: dataset.ValidationData | None
    resume: bool
    total: int
    model: tuple | None

    def take_model(self) -> tuple:
        """The model, which is not kept here: its first values end with those who took it."""
        model, self.model = self.model, None
        return model


def set_up(config: ConfigDict, given: ConfigDict, workdir: Path) -> Run:
    """Read data and model, look at everything that can be wrong, and claim the workdir.

    given: the configuration with paths as users wrote them.
    """
    watch, mesh = Stopwatch(workdir), from_config.mesh_of(config)
    from_config.check(config)
    with watch("data"), multihost.first_before_others("split"):
        split = dataset.find_split(config)
    config = dataset.with_axis(config, split.train)
    given.data.axis = config.data.axis
    model_selection.check(config, split)
    worker_pool.check(config.eval.workers)
    resume = is_resume(config, workdir, split)
    with watch("model"):
        graphdef, params, frozen, base_digest = build.init_model(config, split.table.num_classes)
    with watch("data"):
        with multihost.first_before_others("verify"):
            verification.ensure(config, split, workdir, say=multihost.say)
        _read_in_shares(config, split, workdir)
        data = dataset.few_shot_data(config, split.train, split.table, workdir, resume=resume)
        held_out = dataset.validation_data(config, split, workdir)
    inputs = {"list": data.list.hash, "data": data.digest, "base": base_digest}
    inputs |= {"validation": held_out.digest} if held_out else {}
    inputs |= {"test": dataset.images_digest(split.test)}
    inputs |= resnet_weights.digests(config.model.cnn_base)
    origin = provenance(**inputs)
    _agree(config, resume, origin, params)
    resumption.claim(given, config, workdir, split, data.list, origin)
    if multihost.is_first():
        write_json(workdir / appearance.FILE, data.looks)
    drawn = pretrained.drawn(config.model, frozen)
    frozen_weights.settle_base(workdir, config.model.base, base_digest, frozen, drawn)
    total = from_config.total_steps(config, len(data.list))
    kernels = device_mesh.over_mesh(build.attention_of, mesh)(config, graphdef, params, frozen)
    multihost.say(
        startup_summary.run(
            config, workdir, mesh, kernels, data, held_out, split.table, params, frozen, total
        )
    )
    model = graphdef, params, frozen
    return Run(config, workdir, watch, mesh, split, data, held_out, resume, total, model)


def _read_in_shares(config: ConfigDict, split: dataset.Split, workdir) -> None:
    """Several processes make the files of the cache together, before each reads them all."""
    if multihost.several():
        cases = split.train + (split.validation if best_parameters.is_on(config) else [])
        dataset.read_cases(config, multihost.own(cases), split.table, workdir)
        multihost.barrier("cache")


def _agree(config: ConfigDict, resume: bool, origin: dict, params) -> None:
    """Several processes make sure that they are about to do the same."""
    if multihost.several():
        values = {
            "whether --workdir holds this run": resume,
            "config": configuration.to_json(config),
        }
        values |= {k: v for k, v in origin.items() if k not in ("git", "devices")}
        multihost.agree(values | {"initial parameters": multihost.checksum(params)})
