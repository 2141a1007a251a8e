"""The summary that a run prints before its first step."""

import jax

from pgpsam_jax.checkpointing import frozen_weights
from pgpsam_jax.methods import registry
from pgpsam_jax.models.parameters import report
from pgpsam_jax.models.sam.weights import TrainedFor
from pgpsam_jax.models.segmenter import Training
from pgpsam_jax.training.plan import TrainingPlan


def describe_run(run, kernels: str) -> str:
    """Describes devices, model, schedule and data of a run, with warnings first.

    Args:
      run: of `setup.set_up`.
      kernels: the attention kernels of the encoder.
    """
    config, data, devices = run.config, run.data, run.mesh.devices.ravel()
    notices = frozen_weights.base_notice(config.model, run.workdir), registry.notice(config.model)
    lines = [
        f"devices    {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
        f"mesh {dict(run.mesh.shape)}, {jax.process_count()} process(es)",
        f"precision  {config.model.compute_dtype} compute, float32 parameters and losses"
        + (", deterministic" if config.deterministic else ""),
        f"attention  {kernels}",
        _conventions(config.model),
        _schedule(run.plan, config.model.image_size, len(data.list)),
        f"few-shot   {data.summary}" + ("" if run.total else " (not used)"),
        f"           {config.data.axis} slices",
        f"           hash {data.list.hash[:16]}, rule {data.list.rule}",
        f"labels     {', '.join(f'{i} {name}' for i, name in enumerate(run.split.table.names))}",
        report(run.params, run.frozen),
    ]
    if run.held_out and run.total:
        lines[-1:-1] = [
            f"validation {len(run.held_out.images)} slices of {run.held_out.cases} case(s) every "
            f"{config.validation.every_epochs} epoch(s); the best parameters are kept"
        ]
    return "\n".join([*(f"!!! {notice}" for notice in notices if notice), *lines])


def _conventions(settings) -> str:
    """Describes the encoder's input colors and the initialization of the method's additions."""
    method = registry.method_of(settings)
    colors, start = method.resolve_colors(settings), method.resolve_start(settings)
    line = f"colors     {colors}; the method's additions to SAM start: {start}"
    if method.resolve_class_tokens(settings):
        line += "; class tokens: sam"
    own = settings.base and TrainedFor.of(settings.base).colors
    if own and own != colors:
        line += f" (the base was trained on {own} colors)"
    return line


def _schedule(plan: TrainingPlan, size: int, slices: int) -> str:
    """Describes the training schedule for a given number of slices."""
    match plan.training:
        case Training.NONE:
            return f"training   none: no parameters to train; slices have {size} px"
        case Training.LBFGS:
            return (
                f"fit        once, to all {slices} slices of {size} px; encoded "
                f"{plan.batch_size} at a time over all devices"
            )
    total = plan.total_steps(slices)
    return (
        f"batch      {plan.batch_size} slices of {size} px over all devices, {total} steps = "
        f"{total * plan.batch_size / slices:.1f} epochs"
    )


def describe_step(
    compiled: jax.stages.Compiled, seconds: float, flops: float | None, *, fit: bool = False
) -> str:
    """Describes the cost of a compiled step.

    Args:
      compiled: the step.
      seconds: it took to compile.
      flops: per device; None if unknown.
      fit: whether the step is an L-BFGS fit.
    """
    text = "fit        " if fit else "step       "
    text += "" if flops is None else f"{flops / 1e9:.1f} GFLOP per device, "
    if (memory := compiled.memory_analysis()) is not None:  # see `step_cost.describe_step`
        temporary = memory.temp_size_in_bytes / 2**30
        total = memory.argument_size_in_bytes / 2**30 + temporary
        text += f"expected memory {total:.2f} GiB per device ({temporary:.2f} temporary), "
    return f"{text}compiled in {seconds:.1f} s"
