"""Training, top to bottom: data, mesh, model, step, restore, loop with validation, evaluation."""

import time
from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import (
    best_parameters,
    checkpoint,
    locations,
)
from pgpsam_jax.checkpointing.workdir_lock import locked
from pgpsam_jax.data.augmentation.augment import augmentation_seed
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.distributed import multihost
from pgpsam_jax.evaluation.workdirs import run_evaluation
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.restore import local_predictor, make_predictor
from pgpsam_jax.methods import build, registry
from pgpsam_jax.runtime import determinism, preemption
from pgpsam_jax.training import (
    feature_cache,
    from_config,
    model_selection,
    startup_summary,
    step_cost,
)
from pgpsam_jax.training.device_batches import Feed
from pgpsam_jax.training.metric_logger import RunLog
from pgpsam_jax.training.setup import Run, set_up
from pgpsam_jax.training.sharded_step import shard_step, sharding_of
from pgpsam_jax.training.timer import Stopwatch
from pgpsam_jax.training.train_loop import run_steps


def train(config: ConfigDict, workdir) -> dict:
    """Train to the last step (resuming where the workdir stands), evaluate, return the summary.

    Raises `errors.Interrupted` where a signal asks for an end (see `interruption`), having saved.
    """
    determinism.demand(config)
    multihost.check_shared(workdir)
    with locked(workdir, "training"):
        return _train(config, Path(workdir))


def _train(given: ConfigDict, workdir: Path) -> dict:
    config = build.settled(locations.found(given, workdir))
    run = set_up(config, build.settled(given, like=config), workdir)
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


def _optimize(run: Run) -> Predictor:
    """Train from where the workdir stands to the last step; a predictor with what was learnt."""
    config, workdir, watch, data = run.config, run.workdir, run.watch, run.data
    graphdef, params, frozen = run.take_model()
    size, total = len(data.list), run.total
    seed = augmentation_seed(config.seed, from_config.step_config(config).augment)
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
    rates, seen = from_config.learning_rates(config, size), from_config.slices_of_step(config, size)
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
            params = best_parameters.restore_params(workdir, step_of.state.params, best=True)
    if multihost.several():  # each evaluates cases of its own
        return local_predictor(config, graphdef, params, frozen)
    return predictor.with_params(params)


def _compile(run: Run, graphdef, step_of, step: int):
    """The compiled training step; what it costs is told and kept."""
    before = time.perf_counter()
    with run.watch("compile"):
        traced = step_of.trace()
        lowered = traced.lower()
        compiled = lowered.compile()
    seconds = time.perf_counter() - before
    fits = registry.method_of(run.config.model).training is registry.Training.LBFGS
    shapes = step_of.state, step_of.frozen, step_of.batch
    stages, seen = (
        (traced, lowered, compiled),
        from_config.slices_of_step(run.config, len(run.data.list)),
    )
    spent = step_cost.of_step(run.config, run.mesh, graphdef, step_of.run, shapes, *stages, seen)
    flops = spent["flops_per_image"]["training"]
    flops = None if flops is None else flops * seen / run.mesh.size
    multihost.say(startup_summary.step(compiled, seconds, flops, fit=fits))
    step_cost.begin(run.workdir, spent, step)
    return compiled


def _store(watch: Stopwatch) -> None:
    if multihost.is_first():
        watch.store()
