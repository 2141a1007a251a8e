"""Training, top to bottom: data, mesh, model, step, restore, loop with validation, evaluation."""

import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pgpsam_jax import build, checkpoint, cost, sharding, validation
from pgpsam_jax import config as configuration
from pgpsam_jax.data import dataset
from pgpsam_jax.data.augment import augmentation_seed
from pgpsam_jax.data.loader import make_loader
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workers
from pgpsam_jax.evaluation.inference import Predictor
from pgpsam_jax.feed import Feed
from pgpsam_jax.files import write_json
from pgpsam_jax.loop import run_steps
from pgpsam_jax.parameters import report
from pgpsam_jax.provenance import provenance
from pgpsam_jax.runlog import RunLog
from pgpsam_jax.sharded import shard_step, sharding_of
from pgpsam_jax.stopwatch import Stopwatch


def train(config: ConfigDict, workdir) -> dict:
    """Train to the last step (resuming where the workdir stands), evaluate, return the summary."""
    workdir, watch = Path(workdir), Stopwatch(workdir)
    mesh = make_run_mesh(config)
    with watch("data"):
        split = dataset.find_split(config)
    validation.check(config, split)
    workers.check(config.eval.workers)
    resume = configuration.belongs_to(config, workdir)
    if resume and not (workdir / "fewshot.txt").is_file():
        raise UserError(
            f"{workdir} was converted from a checkpoint and has neither a few-shot list nor an "
            "optimiser state to go on from; use --mode evaluate, or train in another --workdir"
        )
    with watch("model"):
        graphdef, params, frozen, base_digest = build.init_model(config, split.table.num_classes)
    with watch("data"):
        data = dataset.few_shot_data(config, split.train, split.table, workdir, resume=resume)
        held_out = dataset.validation_data(config, split, workdir)
    loader = make_loader(
        len(data.images),
        batch_size=config.train.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if not resume:  # everything that can be wrong has been looked at: the workdir is claimed
        data.list.write(workdir / "fewshot.txt")
        write_json(workdir / "labels.json", split.table.to_json())
        configuration.store(config, workdir)
    if jax.process_index() == 0:
        inputs = {"list": data.list.hash, "data": data.digest, "base": base_digest}
        inputs |= {"validation": held_out.digest} if held_out else {}
        write_json(workdir / "provenance.json", provenance(**inputs))
    checkpoint.settle_base(workdir, config.model.base, base_digest, frozen)

    size, total = len(data.list), configuration.total_steps(config, len(data.list))
    seed = augmentation_seed(config.seed, build.step_config(config).augment)
    feed = Feed(data.images, data.labels, loader, mesh, config.data.resident_gib * 2**30)
    batch = feed.abstract(config.train.batch_size)
    step_of = shard_step(config, mesh, graphdef, params, frozen, batch, epoch_size=size, seed=seed)
    frozen = jax.device_put(frozen, sharding_of(step_of.frozen))
    kernels = sharding.over_mesh(build.attention_of, mesh)(config, graphdef, params, frozen)
    print(
        announcement(
            config, workdir, mesh, kernels, data, held_out, split.table, params, frozen, total
        ),
        flush=True,
    )
    checkpoints = checkpoint.Checkpoints(workdir)
    if checkpoints.latest is not None:  # resume: the workdir's newest state
        state = checkpoints.restore(step_of.state, loader)
        print(f"resumed from step {int(state.step)}", flush=True)
    else:
        state = step_of.start(params)
    del params

    step = int(state.step)
    if step < total:
        before = time.perf_counter()
        with watch("compile"):
            lowered = step_of.lower()
            compiled = lowered.compile()
        print(_compile_report(compiled, time.perf_counter() - before), flush=True)
        shapes = step_of.state, step_of.frozen, step_of.batch
        spent = cost.of_step(config, mesh, graphdef, step_of.run, shapes, lowered, compiled)
        cost.begin(workdir, spent, step)
    rates = build.learning_rates(config, size)
    predictor = make_predictor(config, graphdef, state.params, frozen, mesh)
    selection = held_out and validation.Selection(config, held_out, workdir, size, total)
    with watch("train"), RunLog(workdir, config.log, step, rates, config.train.batch_size) as log:

        def saves(step) -> bool:
            return step % config.log.checkpoint_steps == 0 or step == total

        def judges(step) -> bool:
            return bool(selection) and selection.due(step)

        while step < total:
            until = next(n for n in range(step + 1, total + 1) if saves(n) or judges(n))
            state, metrics, rows = run_steps(compiled, state, frozen, feed, step, until, log.record)
            step, extra = until, {}
            log.check_finite(step, float(jax.device_get(metrics["loss"])), rows)
            if judges(step):
                with watch("validate"), log.paused():
                    score = selection.judge(predictor.with_params(state.params), step)
                extra["validation_score"] = score
            log.record(step, metrics, rows, **extra)
            if saves(step):
                with watch("checkpoint"), log.paused():
                    checkpoints.save(state, loader)
                watch.store()
                cost.update(workdir, log.records)
    params = state.params
    with watch("checkpoint"):
        checkpoints.close()
        if selection:
            selection.close()
            params = checkpoint.restore_params(workdir, step_of.state.params, best=True)
    loader.close()
    watch.seconds.pop("evaluate", None)  # of an evaluation that this one takes the place of
    with watch("evaluate"):
        summary = run_evaluation(config, workdir, predictor.with_params(params), split)
    watch.store()
    return summary


def evaluate_workdir(workdir, config: ConfigDict | None = None) -> dict:
    """Score a workdir's parameters, newest or best, again: `--mode evaluate`."""
    stored = configuration.load_config(workdir)
    if config is None:
        config = stored
    configuration.belongs_to(config, workdir)
    split = dataset.find_split(config)
    predictor = load_predictor(config, workdir, split.table.num_classes)
    return run_evaluation(config, workdir, predictor, split)


def load_predictor(config: ConfigDict, workdir, num_classes: int) -> Predictor:
    """The trained parameters of a workdir, newest or best, ready for volumes."""
    mesh = make_run_mesh(config)
    if (Path(workdir) / checkpoint.FROZEN).is_file():  # it needs no other backbone
        config = config.copy_and_resolve_references()
        config.model.base = ""
    graphdef, params, frozen, digest = build.init_model(config, num_classes)
    checkpoint.settle_base(workdir, config.model.base, digest, frozen)
    abstract = checkpoint.abstract_like(params, sharding.state_shardings(params, mesh))
    params = checkpoint.restore_params(workdir, abstract, best=validation.is_on(config))
    if notice := validation.notice(config, workdir):
        print(notice, flush=True)
    frozen = jax.device_put(frozen, sharding.state_shardings(frozen, mesh))
    return make_predictor(config, graphdef, params, frozen, mesh)


def make_predictor(config: ConfigDict, graphdef, params, frozen, mesh) -> Predictor:
    return Predictor(
        graphdef,
        params,
        frozen,
        image_size=config.model.image_size,
        window=config.data.window,
        levels=config.data.levels,
        batch_size=config.eval.batch_size,
        mesh=mesh,
    )


def run_evaluation(config: ConfigDict, workdir, predictor, split: dataset.Split) -> dict:
    """Write `<workdir>/evaluation` and print its table."""
    from pgpsam_jax.evaluation.evaluate import evaluate  # brings what draws and scores

    notices = [build.base_notice(config.model, workdir), validation.notice(config, workdir)]
    options = {}
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
        notices=[notice for notice in notices if notice],
        **options,
    )
    print((folder / "summary.md").read_text(encoding="utf-8"), flush=True)
    return summary


def make_run_mesh(config: ConfigDict):
    """The mesh of `config.mesh`; the batch must split evenly over its data and fsdp axes."""
    mesh = sharding.make_mesh(**config.mesh)
    lanes = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.batch_size % lanes:
        raise UserError(
            f"train.batch_size {config.train.batch_size} does not divide over the {lanes} devices "
            f"of data x fsdp; choose a multiple of {lanes}, or config.mesh to use fewer"
        )
    return mesh


def announcement(
    config, workdir, mesh, kernels, data, held_out, table, params, frozen, total: int
) -> str:
    """What a run is, before it starts: devices, precision, batch, data, labels, parameters."""
    devices = mesh.devices.ravel()
    notice = build.base_notice(config.model, workdir)
    lines = [
        f"devices    {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
        f"mesh {dict(mesh.shape)}, {jax.process_count()} process(es)",
        f"precision  {config.model.compute_dtype} compute, float32 parameters and losses",
        f"attention  {kernels}",
        f"batch      {config.train.batch_size} slices of {config.model.image_size} px over all "
        f"devices, {total} steps = {total * config.train.batch_size / len(data.list):.1f} epochs",
        f"few-shot   {data.summary}",
        f"           hash {data.list.hash[:16]}, rule {data.list.rule}",
        f"labels     {', '.join(f'{i} {name}' for i, name in enumerate(table.names))}",
        report(params, frozen),
    ]
    if held_out:
        lines[-1:-1] = [
            f"validation {len(held_out.images)} slices of {held_out.cases} case(s) every "
            f"{config.validation.every_epochs} epoch(s); the best parameters are kept"
        ]
    if notice:
        lines = [f"!!! {notice}", *lines]
    return "\n".join(lines)


def _compile_report(compiled, seconds: float) -> str:
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    gib = 2**30
    return (
        f"step       {cost.get('flops', float('nan')) / 1e9:.1f} GFLOP per device, expected memory "
        f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / gib:.2f} GiB per device "
        f"({memory.temp_size_in_bytes / gib:.2f} temporary), compiled in {seconds:.1f} s"
    )
