"""Measures points of a scaling study in worker processes, and searches for the largest batch."""

import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Callable

from experiments.measurement import timing
from experiments.measurement.csv_table import FAILED, OK
from experiments.measurement.study import Study
from experiments.measurement.worker_process import Process
from experiments.scaling.points import Compiled, Measured
from pgpsam_jax.profiling import aot

SIMULATION = "simulation: {} devices share these cores; says nothing about speed-up"


def fit(study: Study, point: Compiled, most: int = 4096) -> dict:
    """Finds the largest batch per chip that fits, to within a sixteenth, and marks its row.

    Extrapolates linearly from the known batches, including those in the folder. Returns the row of
    that batch, or of the smallest batch if none fits.
    """
    known = {}
    while (batch := next_batch(known, most)) is not None:
        row = study.row(dataclasses.replace(point, batch=batch))
        if row["status"] == FAILED:
            break
        known[batch] = row["status"] == OK, row["total_bytes"], row["limit_bytes"]
    best = max((batch for batch, (fits, *_) in known.items() if fits), default=0)
    row = study.rows[dataclasses.replace(point, batch=max(best, 1)).key]
    row["largest_that_fits"] = 1 if best else None
    study.keep(row)
    return row


def next_batch(known: dict[int, tuple[bool, int, int]], most: int) -> int | None:
    """Returns the batch to try next; None at the end.

    known: batch -> (whether it fits, bytes needed, bytes available).
    """
    low = max((batch for batch, (fits, *_) in known.items() if fits), default=0)
    high = min((batch for batch, (fits, *_) in known.items() if not fits), default=most + 1)
    step = max(1, low // 16)
    if high - low <= step:
        return None
    guess = 2 * low or 1
    if len(known) > 1:  # memory grows almost linearly
        (a, (_, first, _)), (b, (_, second, limit)) = sorted(known.items())[-2:]
        slope = (second - first) / (b - a)
        guess = int(b + (limit - second) / slope) if slope > 0 else guess
    return min(max(guess, low + step), max(high - step, low + 1), 16 * low or 1)


def compile_with(limit: float) -> Callable[[Compiled], dict]:
    """Returns a function that compiles a point within `limit` seconds."""
    versions = {name: _version(name) for name in ("jax", "libtpu")}

    def measure(point: Compiled) -> dict:
        with Process({"JAX_PLATFORMS": "cpu"}, limit) as process:
            compile_point = "experiments.scaling.compiled:compile_point"
            row = process.ask(call=compile_point, point=dataclasses.asdict(point))
        return row | versions | {"slice": aot.slice_name(point.topology)}

    return measure


def measure_with(limit: float, effort: timing.Effort) -> Callable[[Measured], dict]:
    """Returns a function that times a point; each answer must come within `limit` seconds."""

    def measure(point: Measured) -> dict:
        step = "experiments.scaling.measured:Step"
        with _devices_process(point.devices if point.simulated else 0, limit) as process:
            row = timing.prepare(process, step, point=dataclasses.asdict(point))
            row |= timing.time_steps(process, row["platform"], effort)
            row |= process.ask(memory=None)
        return {
            "status": OK,
            **row,
            **timing.rates(row, row["global_batch"], point.dtype, point.devices),
            "stopped_by_budget": int(row["steps"] < effort.steps),
            "note": SIMULATION.format(point.devices) if point.simulated else None,
        }

    return measure


def local_devices(simulate: int, limit: float) -> dict:
    """Returns `count` and `platform` of the devices, from a process that releases them again."""
    with _devices_process(simulate, limit) as process:
        return process.ask(call="experiments.scaling.measured:count_devices")


def _devices_process(simulate: int, limit: float) -> Process:
    """Starts a worker with that many simulated devices; 0 for the real ones."""
    if not simulate:
        return Process(patience=limit)
    name = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{name}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{flags} {name}={simulate}".strip()
    return Process({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, limit)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
