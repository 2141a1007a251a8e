"""Training, top to bottom: data, mesh, model, step, restore, loop with validation, evaluation."""

import contextlib
import dataclasses
import time
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import checkpoint, frozen_weights, locations, resumption, workdir_lock
from pgpsam_jax.checkpointing.provenance import provenance
from pgpsam_jax.config import identity
from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.data import dataset
from pgpsam_jax.data.augmentation.augment import augmentation_seed
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.data.io import array_files
from pgpsam_jax.data.quality import appearance, verification
from pgpsam_jax.distributed import multihost
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.methods import build, registry
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.runtime import determinism, preemption, worker_pool
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import feature_cache, model_selection, startup_summary, step_cost
from pgpsam_jax.training.device_batches import Feed
from pgpsam_jax.training.metric_logger import RunLog
from pgpsam_jax.training.sharded_step import shard_step, sharding_of
from pgpsam_jax.training.timer import Stopwatch
from pgpsam_jax.training.train_loop import run_steps
from pgpsam_jax.utils.files import write_json


def train(config: ConfigDict, workdir) -> dict:
    """Train to the last step (resuming where the workdir stands), evaluate, return the summary.

    Raises `errors.Interrupted` where a signal asks for an end (see `interruption`), having saved.
    """
    determinism.demand(config)
    multihost.check_shared(workdir)
    with _locked(workdir, "training"):
        return _train(config, Path(workdir))


def _locked(workdir, doing: str):
    """The workdir's lock, which the first of several processes holds for all."""
    return workdir_lock.held(workdir, doing) if multihost.is_first() else contextlib.nullcontext()


@dataclasses.dataclass
class _Run:
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


def _train(given: ConfigDict, workdir: Path) -> dict:
    config = build.settled(locations.found(given, workdir))
    run = _begin(config, build.settled(given, like=config), workdir)
    config = run.config
    if run.total:
        predictor = _optimize(run)
    else:  # nothing trains: what was loaded is what is evaluated
        step_cost.begin(workdir, step_cost.of_inference(config, run.mesh, *run.model), 0)
        predictor = local_predictor(config, *run.take_model())
    run.watch.seconds.pop("evaluate", None)  # of an evaluation that this one takes the place of
    with run.watch("evaluate"):
        summary = run_evaluation(config, workdir, predictor, run.split)
    if not run.total:
        step_cost.update(workdir, [])
    _store(run.watch)
    return summary


def _begin(config: ConfigDict, given: ConfigDict, workdir: Path) -> _Run:
    """Read data and model, look at everything that can be wrong, and claim the workdir.

    given: the configuration with paths as users wrote them.
    """
    watch, mesh = Stopwatch(workdir), make_run_mesh(config)
    build.check(config)
    with watch("data"), multihost.first_before_others("split"):
        split = dataset.find_split(config)
    config = dataset.with_axis(config, split.train)
    given.data.axis = config.data.axis
    model_selection.check(config, split)
    worker_pool.check(config.eval.workers)
    resume = resumption.goes_on(config, workdir, split)
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
    drawn = build.drawn(config.model, frozen)
    frozen_weights.settle_base(workdir, config.model.base, base_digest, frozen, drawn)
    total = build.total_steps(config, len(data.list))
    kernels = device_mesh.over_mesh(build.attention_of, mesh)(config, graphdef, params, frozen)
    multihost.say(
        startup_summary.run(
            config, workdir, mesh, kernels, data, held_out, split.table, params, frozen, total
        )
    )
    model = graphdef, params, frozen
    return _Run(config, workdir, watch, mesh, split, data, held_out, resume, total, model)


def _optimize(run: _Run) -> Predictor:
    """Train from where the workdir stands to the last step; a predictor with what was learnt."""
    config, workdir, watch, data = run.config, run.workdir, run.watch, run.data
    graphdef, params, frozen = run.take_model()
    size, total = len(data.list), run.total
    seed = augmentation_seed(config.seed, build.step_config(config).augment)
    slices = {"image": data.images, "label": data.labels}
    if config.train.encoded_copies:
        with watch("data"):
            model = graphdef, params, frozen
            slices = feature_cache.encoded_set(config, run.mesh, model, *slices.values(), seed=seed)
            del model
    loader = make_loader(size, batch_size=config.train.batch_size, seed=config.seed)
    feed = Feed(slices, loader, run.mesh, config.data.resident_gib * 2**30)
    batch = feed.abstract(config.train.batch_size)
    step_of = shard_step(
        config, run.mesh, graphdef, params, frozen, batch, epoch_size=size, seed=seed
    )
    frozen = multihost.place(frozen, sharding_of(step_of.frozen))
    checkpoints = checkpoint.Checkpoints(workdir)
    if checkpoints.latest is not None:  # resume: the workdir's newest state
        state = checkpoints.restore(step_of.state, loader)
        multihost.say(f"resumed from step {int(state.step)}")
    else:
        state = step_of.start(multihost.place(params, sharding_of(step_of.state.params)))
        if run.resume:
            multihost.say(f"{workdir} holds no checkpoint yet: training starts anew")
    del params

    step, compiled = int(state.step), None
    if step < total:
        compiled = _compile(run, graphdef, step_of, step)
    multihost.barrier("compiled")
    rates, seen = build.learning_rates(config, size), build.slices_of_step(config, size)
    predictor = make_predictor(config, graphdef, state.params, frozen, run.mesh)
    selection = run.held_out and model_selection.Selection(
        config, run.held_out, workdir, size, total, run.split.table.names
    )
    with (
        preemption.deferred() as stop,
        watch("train"),
        checkpoints,
        RunLog(workdir, config.log, step, rates, seen, data.list.entries) as log,
    ):

        def saves(step) -> bool:
            return step % config.log.checkpoint_steps == 0 or step == total

        def judges(step) -> bool:
            return bool(selection) and selection.due(step)

        stop.begin(step)
        stopping = False
        while step < total and not stopping:
            until = next(n for n in range(step + 1, total + 1) if saves(n) or judges(n))
            state, step, metrics, rows = run_steps(
                compiled, state, frozen, feed, step, until, log.record, stop.due
            )
            extra = {}
            log.check_finite(step, metrics, rows)
            if judges(step):
                with watch("validate"), log.paused():
                    score = selection.judge(predictor.with_params(state.params), step)
                extra |= {"validation_score": score} | selection.silent
            log.record(step, metrics, rows, **extra)
            stopping = stop.due(step)
            if saves(step) or stopping:
                with watch("checkpoint"), log.paused():
                    checkpoints.save(state, loader)
                _store(watch)
                step_cost.update(workdir, log.records)
        params = state.params
        with watch("checkpoint"):
            checkpoints.close()
            if selection:
                selection.close()
        if step < total:
            multihost.barrier("stopped")
            stop.end(step, agreed=True)
    loader.close()
    if selection:
        with watch("checkpoint"):
            params = checkpoint.restore_params(workdir, step_of.state.params, best=True)
    if multihost.several():  # each evaluates cases of its own
        return local_predictor(config, graphdef, params, frozen)
    return predictor.with_params(params)


def _compile(run: _Run, graphdef, step_of, step: int):
    """The compiled training step; what it costs is told and kept."""
    before = time.perf_counter()
    with run.watch("compile"):
        traced = step_of.trace()
        lowered = traced.lower()
        compiled = lowered.compile()
    seconds, fits = time.perf_counter() - before, registry.method_of(run.config.model).steps == 1
    shapes = step_of.state, step_of.frozen, step_of.batch
    stages, seen = (traced, lowered, compiled), build.slices_of_step(run.config, len(run.data.list))
    spent = step_cost.of_step(run.config, run.mesh, graphdef, step_of.run, shapes, *stages, seen)
    flops = spent["flops_per_image"]["training"]
    flops = None if flops is None else flops * seen / run.mesh.size
    multihost.say(startup_summary.step(compiled, seconds, flops, fit=fits))
    step_cost.begin(run.workdir, spent, step)
    return compiled


def _read_in_shares(config: ConfigDict, split: dataset.Split, workdir) -> None:
    """Several processes make the files of the cache together, before each reads them all."""
    if multihost.several():
        cases = split.train + (split.validation if model_selection.is_on(config) else [])
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


def _store(watch: Stopwatch) -> None:
    if multihost.is_first():
        watch.store()


def evaluate_workdir(workdir, config: ConfigDict | None = None) -> dict:
    """Score a workdir's parameters, newest or best, again: `--mode evaluate`."""
    stored = configuration.load_config(workdir)
    determinism.demand(config or stored)
    multihost.check_shared(workdir)
    with _locked(workdir, "evaluating"):
        return _evaluate(config, stored, workdir)


def _evaluate(config: ConfigDict | None, stored: ConfigDict, workdir) -> dict:
    config = locations.found(stored if config is None else config, workdir)
    config = build.settled(config)
    split = dataset.find_split(config)
    config = dataset.with_axis(config, split.train)
    identity.check_same(stored, config, workdir, free=identity.LENGTH)
    resumption.compare(workdir, split)
    predictor = load_predictor(config, workdir, split.table.num_classes)
    return run_evaluation(config, workdir, predictor, split)


def load_predictor(config: ConfigDict, workdir, num_classes: int) -> Predictor:
    """The trained parameters of a workdir, newest or best, ready for volumes."""
    config = config.copy_and_resolve_references()
    config.model.cnn_base = ""  # where training started; what trained comes from the workdir
    no_base = frozen_weights.holds_all(workdir)
    config.model.base = "" if no_base else locations.find_base(config, workdir)
    new = frozen_weights.frozen_origin(workdir) is None
    graphdef, params, frozen, digest = build.init_model(config, num_classes, drawn=new)
    drawn = build.drawn(config.model, frozen)
    frozen_weights.settle_base(workdir, config.model.base, digest, frozen, drawn)
    everywhere = device_mesh.replicated(device_mesh.make_mesh())
    abstract = checkpoint.abstract_like(params, jax.tree.map(lambda _: everywhere, params))
    params = checkpoint.restore_params(workdir, abstract, best=model_selection.is_on(config))
    if notice := model_selection.notice(config, workdir):
        multihost.say(notice)
    return local_predictor(config, graphdef, params, frozen)


def local_predictor(config: ConfigDict, graphdef, params, frozen) -> Predictor:
    """A predictor on all devices of this process, whatever mesh the run was trained on."""
    mesh = device_mesh.make_mesh(devices=jax.local_devices())
    params, frozen = (
        multihost.place(multihost.whole(tree), device_mesh.replicated(mesh))
        for tree in (params, frozen)
    )
    return make_predictor(config, graphdef, params, frozen, mesh)


def make_predictor(config: ConfigDict, graphdef, params, frozen, mesh) -> Predictor:
    return Predictor(
        graphdef,
        params,
        frozen,
        image_size=config.model.image_size,
        window=dataset.window_of(config),
        levels=config.data.levels,
        batch_size=config.eval.batch_size,
        mesh=mesh,
        oracle=registry.method_of(config.model).oracle,
    )


def run_evaluation(config: ConfigDict, workdir, predictor, split: dataset.Split) -> dict:
    """Write `<workdir>/evaluation` and print its table."""
    from pgpsam_jax.evaluation.evaluate import evaluate  # brings what draws and scores

    notices = [build.base_notice(config.model, workdir), registry.notice(config.model)]
    notices += [model_selection.notice(config, workdir), resumption.notice(workdir, split)]
    options = {"axis": config.data.axis}
    if config.data.layout == "transunet":
        notices.append(array_files.NO_GRID)
    if config.data.split == "within_volume":
        notices.append(
            "Training and scored slices come from the same volumes: no claim of generalisation. "
            f'Scored are the slices of the few-shot pool ("{config.fewshot.pool}") that were not '
            "trained on."
        )
        entries = dataset.stored_list(workdir).entries
        options["region_of"] = dataset.unseen_slices(config, split.table, entries)
    folder = Path(workdir) / "evaluation"
    summary = evaluate(
        predictor,
        split.test,
        split.table,
        folder,
        nsd_tolerance_mm=config.eval.nsd_tolerance_mm,
        min_pixels=config.fewshot.min_pixels,
        overlays=config.eval.overlays,
        workers=config.eval.workers,
        oracle=predictor.oracle,
        notices=[notice for notice in notices if notice],
        **options,
    )
    multihost.say((folder / "summary.md").read_text(encoding="utf-8"))
    return summary


def make_run_mesh(config: ConfigDict):
    """The mesh of `config.mesh` over all devices; one that does not fit the run is refused."""
    mesh = device_mesh.make_mesh(**config.mesh)
    device_mesh.check(mesh, config)
    return mesh
