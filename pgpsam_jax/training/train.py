"""Trains a model, top to bottom: set up, feed, step, restore, compile, loop, evaluate."""

import functools
import time
from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import best_parameters, checkpoint
from pgpsam_jax.checkpointing.workdir_lock import locked
from pgpsam_jax.data.augmentation.augment import augmentation_seed
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.distributed import multihost
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.restore import make_predictor
from pgpsam_jax.inference.settings import InferenceSettings
from pgpsam_jax.methods.registry import Training
from pgpsam_jax.runtime import determinism, preemption
from pgpsam_jax.training import feature_cache, startup_summary, step_cost
from pgpsam_jax.training.device_batches import DeviceBatches
from pgpsam_jax.training.metric_logger import MetricLogger
from pgpsam_jax.training.model_selection import Selection
from pgpsam_jax.training.setup import Run, set_up
from pgpsam_jax.training.sharded_step import ShardedStep, shard_step, sharding_of
from pgpsam_jax.training.stagnation import stagnation
from pgpsam_jax.training.train_loop import Moment, TrainLoop
from pgpsam_jax.training.train_state import TrainState


def train(config: ConfigDict, workdir) -> dict:
    """Trains to the last step, evaluates, and returns the summary.

    A workdir that holds this run resumes from its newest checkpoint.

    Raises:
      errors.Interrupted: after saving, at a stop signal (see `runtime.preemption`).
    """
    determinism.demand(config.deterministic, config.augment.seeded)
    multihost.check_shared(workdir)
    with locked(workdir, "training"):
        run = set_up(config, Path(workdir))
        predictor = fit(run) if run.total else _untrained_predictor(run)
        return _evaluate(run, predictor)


def fit(run: Run) -> Predictor:
    """Trains from the workdir's newest state to the last step; returns a predictor."""
    config, plan, size = run.config, run.plan, len(run.data.list)
    feed, seed = _make_feed(run)
    step = shard_step(
        plan,
        run.mesh,
        run.graphdef,
        run.params,
        run.frozen,
        feed.abstract(plan.batch_size),
        epoch_size=size,
        seed=seed,
    )
    multihost.put_state_global(run.frozen, sharding_of(step.frozen))
    checkpoints = checkpoint.Checkpoints(run.workdir)
    state = _restore_or_start(run, step, checkpoints, feed.loader)
    done = int(state.step)
    compiled = _compile(run, step, done) if done < run.total else None
    multihost.barrier("compiled")

    predictor = _predictor_of(run, state.params)
    selection = (
        None
        if run.held_out is None
        else Selection(
            config.validation,
            run.held_out,
            run.workdir,
            plan.batch_size,
            size,
            run.total,
            run.split.table.names,
        )
    )
    log = MetricLogger(
        run.workdir,
        config.log,
        done,
        plan.learning_rates(size),
        plan.slices_per_step(size),
        run.data.list.entries,
    )

    def validate(selection: Selection, moment: Moment) -> None:
        with run.watch("validate"), log.paused():
            score = selection.evaluate(predictor.with_params(moment.state.params), moment.step)
        moment.scalars |= {"validation_score": score} | selection.never_predicted

    def record(moment: Moment) -> None:
        log.record(moment.step, moment.metrics, moment.rows, **moment.scalars)

    def save(moment: Moment) -> None:
        with run.watch("checkpoint"), log.paused():
            checkpoints.save(moment.state, feed.loader)
        run.store_times()
        step_cost.update_record(run.workdir, log.records)

    with preemption.defer_to_step(done) as stop, run.watch("train"), checkpoints, log:
        loop = TrainLoop(run.total, log.record, stop.should_stop)
        loop.add_hook(lambda moment: log.check_finite(moment.step, moment.metrics, moment.rows))
        if selection:
            loop.add_hook(functools.partial(validate, selection), when=selection.should_validate)
        loop.add_hook(record)
        loop.add_hook(save, every=config.log.checkpoint_steps, at_end=True)
        state, done = loop.run(compiled, state, run.frozen, feed, done)
        with run.watch("checkpoint"):
            checkpoints.close()
            if selection:
                selection.close()
        if done < run.total:
            multihost.barrier("stopped")
            stop.interrupt(done, agreed=True)
    feed.loader.close()
    if warning := stagnation(log.records):
        multihost.print_once(warning)
    params = state.params
    if selection:
        with run.watch("checkpoint"):
            params = best_parameters.restore_params(run.workdir, step.state.params, best=True)
    predictor = predictor.with_params(params)
    # Each of several processes evaluates its share of the cases.
    return predictor.on_local_devices() if multihost.is_multiprocess() else predictor


def _make_feed(run: Run) -> tuple[DeviceBatches, int]:
    """Returns the batches of the run, precomputed features if configured, and the seed."""
    config, plan = run.config, run.plan
    seed = augmentation_seed(config.seed, plan.step.augment)
    slices = {"image": run.data.images, "label": run.data.labels}
    if plan.step.encoded:
        with run.watch("data"):
            slices = feature_cache.encode_few_shot_set(
                plan.step,
                run.mesh,
                (run.graphdef, run.params, run.frozen),
                *slices.values(),
                seed=seed,
                batch_size=config.eval.batch_size,
                resident_gib=config.data.resident_gib,
            )
    loader = make_loader(len(run.data.list), batch_size=plan.batch_size, seed=config.seed)
    return DeviceBatches(slices, loader, run.mesh, config.data.resident_gib * 2**30), seed


def _restore_or_start(run: Run, step: ShardedStep, checkpoints, loader) -> TrainState:
    """Returns the newest state of the workdir, or the initial state."""
    if checkpoints.latest is not None:
        state = checkpoints.restore(step.state, loader)
        multihost.print_once(f"resumed from step {int(state.step)}")
        return state
    if run.resume:
        multihost.print_once(f"{run.workdir} holds no checkpoint yet; training starts over")
    multihost.put_state_global(run.params, sharding_of(step.state.params))
    return step.start(run.params)


def _compile(run: Run, step: ShardedStep, done: int):
    """Compiles the step; prints and stores its cost."""
    before = time.perf_counter()
    with run.watch("compile"):
        traced = step.trace()
        lowered = traced.lower()
        compiled = lowered.compile()
    seconds, slices = time.perf_counter() - before, run.plan.slices_per_step(len(run.data.list))
    spent = step_cost.describe_step(
        run.config.model,
        run.mesh,
        run.graphdef,
        step.run,
        (step.state, step.frozen, step.batch),
        traced,
        lowered,
        compiled,
        slices,
    )
    flops = spent["flops_per_image"]["training"]
    flops = None if flops is None else flops * slices / run.mesh.size
    fitted = run.plan.training is Training.LBFGS
    multihost.print_once(startup_summary.describe_step(compiled, seconds, flops, fit=fitted))
    step_cost.start_record(run.workdir, spent, done)
    return compiled


def _untrained_predictor(run: Run) -> Predictor:
    """Returns the predictor of a method without trainable parameters."""
    model = run.graphdef, run.params, run.frozen
    step_cost.start_record(
        run.workdir, step_cost.describe_inference(run.config.model, run.mesh, *model), 0
    )
    return _predictor_of(run, run.params).on_local_devices()


def _predictor_of(run: Run, params) -> Predictor:
    settings = InferenceSettings.of(run.config.eval, run.workdir, run.split.table.names)
    model = run.graphdef, params, run.frozen
    return make_predictor(run.config, model, run.mesh, settings)


def _evaluate(run: Run, predictor: Predictor) -> dict:
    if not run.split.test:
        multihost.print_once(f"{run.workdir} {workdirs.NO_TEST}")
        run.store_times()
        return {}
    run.watch.seconds.pop("evaluate", None)  # of a replaced evaluation
    with run.watch("evaluate"):
        summary = workdirs.run_evaluation(run.config, run.workdir, predictor, run.split)
    if not run.total:
        step_cost.update_record(run.workdir, [])
    run.store_times()
    return summary
