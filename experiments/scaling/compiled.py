"""Compiles one point for a topology and estimates its time from the compiled program."""

import math
import re
import time

import jax
from flax import nnx

from experiments.measurement.csv_table import OK, TOO_LARGE
from experiments.measurement.points import CLASSES, SLICES
from experiments.scaling import hlo_collectives, roofline
from experiments.scaling.hlo_traffic import memory_traffic
from experiments.scaling.points import Compiled
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.parameters import count
from pgpsam_jax.profiling import accelerators, aot, flops
from pgpsam_jax.sharding import rules
from pgpsam_jax.training import plan
from pgpsam_jax.training.plan import TrainingPlan

# Reserved in a chip's memory for the runtime, a resident few-shot set and the next batch.
RESERVE = 2**30


def compile_point(point: dict) -> dict:
    """Returns the columns of a row from the fields of a `Compiled`; `status`: whether it fits.

    Columns `estimate_*` are the roofline's. Its compute term takes the larger of two counts: XLA's
    (with recomputation, without hand-written kernels) and the formula's. `accessed_bytes` is the
    compiler's count and includes the chip's fast memory; `hbm_bytes` does not.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # else reading it would be timed
    point = Compiled(**point)
    chips = aot.topology_devices(point.topology)
    chip = accelerators.find_chip(chips[0].device_kind)
    if chip is None:
        raise UserError(
            f"{chips[0].device_kind} is unknown; add it to pgpsam_jax/profiling/accelerators.py"
        )
    config = point.config(len(chips))
    mesh = plan.mesh_of(config.mesh, config.model, config.train.batch_size, chips)
    start = time.perf_counter()
    model = aot.abstract_model(config.model, CLASSES, mesh)
    lowered = aot.lower_step(
        TrainingPlan.from_config(config), mesh, model, config.model.image_size, SLICES
    )
    traced = time.perf_counter()
    row = {
        **dict(zip(rules.AXES, mesh.devices.shape, strict=True)),
        "chips": mesh.size,
        "global_batch": config.train.batch_size,
        "device": chips[0].device_kind,
        "trained_parameters": count(model[1]),
        "frozen_parameters": count(model[2]),
        "limit_bytes": int(chip.memory_bytes - RESERVE),
        "trace_seconds": traced - start,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := needed_bytes(str(error))) is None:
            raise
        row |= {"total_bytes": needed, "reason": "the compiler ran out of the chip's memory"}
        return row | {"status": TOO_LARGE, "compile_seconds": time.perf_counter() - traced}
    row["compile_seconds"] = time.perf_counter() - traced
    return row | _figures(point, config, mesh, chip, model, compiled, row["limit_bytes"])


def needed_bytes(message: str) -> int | None:
    """Returns the bytes of a program too large, from "Used 20.5G of 15.75G hbm" in the message."""
    match = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None


def _figures(point, config, mesh, chip, model, compiled, limit) -> dict:
    found = aot.compiled_cost(compiled)
    needed = flops.total(flops.pgpsam(nnx.merge(*model).config, "lora", training=True))
    per_chip = needed.training * config.train.batch_size / mesh.size
    row = {
        "status": OK if found.total <= limit else TOO_LARGE,
        "arguments_bytes": found.arguments,
        "temporaries_bytes": found.temporaries,
        "outputs_bytes": found.outputs,
        "aliased_bytes": found.aliased,
        "total_bytes": found.total,
        "xla_flops": found.flops,
        "formula_flops": per_chip,
        "accessed_bytes": found.accessed,
    }
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # jaxlib may be older than libtpu's programs
        return row | {"reason": f"memory and FLOPs only, no text of the program: {error}"[:160]}
    exchanged, moved = hlo_collectives.collectives(text), memory_traffic(text)
    coordinates = [tuple(device.coords) for device in mesh.devices.flat]
    term = roofline.estimate(
        chip,
        max(found.flops or 0.0, per_chip),
        moved,
        roofline.exchange_seconds(chip, point.topology, exchanged, coordinates),
    )
    row |= {
        "hbm_bytes": moved,
        "loops_unknown": sum(not one.bounded for one in exchanged),
        "exchanges": largest(exchanged),
        "estimate_compute_seconds": term.compute,
        "estimate_hbm_seconds": term.hbm,
        "estimate_ici_seconds": term.ici,
        "estimate_seconds": term.seconds,
        "estimate_binds": term.binds,
        "estimate_images_per_second": config.train.batch_size / term.seconds,
        "estimate_mfu": per_chip / term.seconds / chip.bf16_flops,
    }
    for kind, (times, size) in roofline.by_kind(exchanged).items():
        row[f"{kind}_count"], row[f"{kind}_bytes"] = times, size
    row["ici_bytes"] = math.fsum(row[f"{kind}_bytes"] for kind in hlo_collectives.KINDS)
    return row


def largest(found, most: int = 4) -> str:
    """Lists the kinds and group sizes that exchange most: `12 all-gather over 8: 34.5 MB; ...`."""
    totals: dict[tuple[str, int], list[float]] = {}
    for one in found:
        total = totals.setdefault((one.kind, len(one.group)), [0, 0.0])
        total[0] += one.times
        total[1] += one.times * one.size
    order = sorted(totals.items(), key=lambda item: -item[1][1])[:most]
    return "; ".join(f"{n} {kind} over {g}: {size / 1e6:.3g} MB" for (kind, g), (n, size) in order)
