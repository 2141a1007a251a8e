"""What a run prints before its first step."""

import jax

from pgpsam_jax import build, methods
from pgpsam_jax.parameters import report


def run(config, workdir, mesh, kernels, data, held_out, table, params, frozen, total: int) -> str:
    """What a run is, before it starts: devices, precision, batch, data, labels, parameters."""
    devices = mesh.devices.ravel()
    notices = build.base_notice(config.model, workdir), methods.notice(config.model)
    lines = [
        f"devices    {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
        f"mesh {dict(mesh.shape)}, {jax.process_count()} process(es)",
        f"precision  {config.model.compute_dtype} compute, float32 parameters and losses"
        + (", deterministic" if config.deterministic else ""),
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
    return "\n".join([*(f"!!! {notice}" for notice in notices if notice), *lines])


def step(compiled, seconds: float) -> str:
    """What a step costs by the compiler's count, once it is compiled."""
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    gib = 2**30
    return (
        f"step       {cost.get('flops', float('nan')) / 1e9:.1f} GFLOP per device, expected memory "
        f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / gib:.2f} GiB per device "
        f"({memory.temp_size_in_bytes / gib:.2f} temporary), compiled in {seconds:.1f} s"
    )
