"""Sets up a run: reads data and model and checks everything before the first step."""

import dataclasses
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import best_parameters, frozen_weights, locations, resumption
from pgpsam_jax.checkpointing.provenance import provenance
from pgpsam_jax.config import exclusive_fields, to_json
from pgpsam_jax.data import dataset
from pgpsam_jax.data.cache import build_cache
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.preprocessing import Preprocessing, window_of
from pgpsam_jax.data.quality import appearance, verification
from pgpsam_jax.distributed import multihost
from pgpsam_jax.methods import build, pretrained
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.runtime import worker_pool
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import model_selection, startup_summary
from pgpsam_jax.training.plan import TrainingPlan, mesh_of
from pgpsam_jax.training.resume import is_resume
from pgpsam_jax.training.timer import Stopwatch
from pgpsam_jax.utils.files import write_json


@dataclasses.dataclass
class Run:
    """A run that is ready for its first step.

    Attributes:
      config: its configuration, with resolved paths.
      plan: how it trains.
      watch: seconds per activity.
      split, data, held_out: cases, few-shot slices, and validation slices or None.
      resume: whether the workdir already held this run.
      total: steps of the whole run.
      graphdef, params, frozen: the model before the first step, moved to the mesh in place.
    """

    config: ConfigDict
    plan: TrainingPlan
    workdir: Path
    watch: Stopwatch
    mesh: Mesh
    split: dataset.Split
    data: dataset.FewShotData
    held_out: dataset.ValidationData | None
    resume: bool
    total: int
    graphdef: nnx.GraphDef
    params: nnx.State
    frozen: nnx.State

    def store_times(self) -> None:
        """Stores `timing.json`."""
        if multihost.is_first():
            self.watch.store()


def set_up(given: ConfigDict, workdir: Path) -> Run:
    """Reads data and model, checks them, and records the run in the workdir.

    Args:
      given: the configuration with paths as the user wrote them.
      workdir: locked by this process.

    Raises:
      UserError: the first fault; only caches have been written then.
    """
    config = build.resolve_method_defaults(locations.resolve_paths(given, workdir))
    given = build.resolve_method_defaults(given, like=config)
    plan = TrainingPlan.from_config(config)
    mesh = mesh_of(config.mesh, config.model, config.train.batch_size)
    exclusive_fields.check_run_settings(config)
    worker_pool.check(config.eval.workers)
    watch = Stopwatch(workdir)

    with watch("data"), multihost.first_before_others("split"):
        split = dataset.find_split(config.data)
    given.data.axis = config.data.axis = dataset.axis_of(config.data, split.train)
    model_selection.check(config.validation, config.data, split)
    resume = is_resume(config, workdir, split)

    with watch("model"):
        graphdef, params, frozen, base_digest = build.init_model(
            config.model, split.table.num_classes, config.seed
        )

    with watch("data"):
        with multihost.first_before_others("verify"):
            verification.verify_run_data(config.data, split, workdir, say=multihost.print_once)
        validation = split.validation if best_parameters.keeps_best(config.validation) else []
        preprocessing = Preprocessing.from_config(config.data, config.model.image_size)
        folder = config.data.cache_dir or workdir / "cache"
        trained, validated = _read_cases(split, validation, preprocessing, folder)
        data = dataset.few_shot_data(
            trained,
            config.fewshot,
            split.table.names,
            workdir if resume else None,
            {case.case_id: case.group for case in split.train if case.group},
        )
        held_out = None
        if validated:
            held_out = dataset.validation_data(
                validated, split.table.num_classes, config.fewshot.min_pixels
            )

    inputs = {"list": data.list.hash, "data": data.digest, "base": base_digest}
    inputs |= {"validation": held_out.digest} if held_out else {}
    inputs |= {"test": dataset.images_digest(split.test)}
    inputs |= resnet_weights.digests(config.model.cnn_base)
    origin = provenance(**inputs)
    if multihost.is_multiprocess():
        shared = {"whether --workdir holds this run": resume, "config": to_json(config)}
        _agree(shared, origin, params)
    resumption.record_run_identity(given, config, workdir, split, data.list, origin)
    if multihost.is_first():
        statistics = appearance.training_statistics(
            trained, window=window_of(config.data), layout=config.data.layout
        )
        write_json(workdir / appearance.FILE, statistics)
    sampled = pretrained.randomly_initialized_frozen_params(config.model, frozen)
    frozen_weights.pin_frozen_weights(workdir, config.model.base, base_digest, frozen, sampled)

    with device_mesh.traced_on(mesh):
        kernels = build.attention_of(config.model, graphdef, params, frozen)
    run = Run(
        config=config,
        plan=plan,
        workdir=workdir,
        watch=watch,
        mesh=mesh,
        split=split,
        data=data,
        held_out=held_out,
        resume=resume,
        total=plan.total_steps(len(data.list)),
        graphdef=graphdef,
        params=params,
        frozen=frozen,
    )
    multihost.print_once(startup_summary.describe_run(run, kernels))
    return run


def _read_cases(split: dataset.Split, validation: list[Case], preprocessing: Preprocessing, folder):
    """Reads training and validation cases through the cache in `folder`."""
    if multihost.is_multiprocess():  # share the work of filling the cache
        share = multihost.shard_for_process(split.train + validation)
        build_cache(share, split.table, preprocessing, folder)
        multihost.barrier("cache")
    return (
        build_cache(cases, split.table, preprocessing, folder)
        for cases in (split.train, validation)
    )


def _agree(values: dict, origin: dict, params) -> None:
    """Checks that all processes have the same configuration, inputs and initial parameters."""
    values |= {k: v for k, v in origin.items() if k not in ("git", "devices")}
    multihost.agree(values | {"initial parameters": multihost.checksum(params)})
