"""Runs the missing points of a study, each in a fresh process with a time limit."""

import dataclasses
import importlib.metadata
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from experiments.measurement import timing
from experiments.measurement.worker_process import Failed, Process, end_all
from experiments.scaling import csv_table as table
from experiments.scaling.csv_table import FAILED, OK, Kind
from experiments.scaling.points import Compiled, Measured
from pgpsam_jax.profiling import accelerators, aot

_WORKER = "experiments.scaling.worker"
SIMULATION = "simulation: {} devices share these cores; says nothing about speed-up"


class Study:
    """The rows of one kind in a folder; finished rows are kept. Methods are thread-safe.

    Args:
      folder: of the study.
      kind: of its points.
      measure: returns the row of a point, or raises `Failed`.
      retry: measure failed points again.
    """

    def __init__(self, folder, kind: Kind, measure: Callable[[object], dict], retry: bool):
        self.folder, self.kind, self.measure, self.retry = folder, kind, measure, retry
        self.rows = table.load(folder, kind)
        self._lock, self._stopped = threading.Lock(), False
        table.store(folder, kind, self.rows)  # fails now if the folder cannot be written

    def each(self, function: Callable, points: Iterable, workers: int = 1) -> list:
        """Returns function(point) of every point in order, `workers` at a time."""
        with ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(function, points))
            except BaseException:  # interrupted: unfinished points leave no row
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                end_all()
                raise

    def row(self, point) -> dict:
        """Returns the row of a point; measures it if it is missing, or failed and `retry`."""
        found = self.rows.get(point.key)
        if found and not (found["status"] == FAILED and self.retry):
            return found
        row = dataclasses.asdict(point)
        print(point.key, flush=True)
        try:
            row |= self.measure(point)
        except Failed as failure:
            row |= {"status": FAILED, "reason": str(failure)}
        if self._stopped:
            raise Failed("stopped")
        with self._lock:
            self.rows[point.key] = row
            table.store(self.folder, self.kind, self.rows)
        print(f"  {point.key}: {row['status']}{_detail(row)}", flush=True)
        return row

    def fit(self, point: Compiled, most: int = 4096) -> dict:
        """Finds the largest batch per chip that fits, to within a sixteenth, and marks its row.

        Extrapolates linearly from the known batches, including those in the folder. Returns the row
        of that batch, or of the smallest batch if none fits.
        """
        known = {}
        while (batch := next_batch(known, most)) is not None:
            row = self.row(dataclasses.replace(point, batch=batch))
            if row["status"] == FAILED:
                break
            known[batch] = row["status"] == OK, row["total_bytes"], row["limit_bytes"]
        best = max((batch for batch, (fits, *_) in known.items() if fits), default=0)
        row = self.rows[dataclasses.replace(point, batch=max(best, 1)).key]
        with self._lock:
            row["largest_that_fits"] = 1 if best else None
            table.store(self.folder, self.kind, self.rows)
        return row


def _detail(row: dict) -> str:
    if row["status"] == FAILED:
        return f": {row['reason']}"
    return f" (compiled in {row['compile_seconds']:.0f} s)"


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
    environment = timing.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}

    def measure(point: Compiled) -> dict:
        with Process(_WORKER, environment=environment, patience=limit) as process:
            row = process.ask(compile_point=dataclasses.asdict(point))
        return row | versions | {"slice": aot.slice_name(point.topology)}

    return measure


def measure_with(limit: float, effort: timing.Effort) -> Callable[[Measured], dict]:
    """Returns a function that times a point; each answer must come within `limit` seconds."""

    def measure(point: Measured) -> dict:
        with _devices_process(point.devices if point.simulated else 0, limit) as process:
            row = process.ask(prepare=dataclasses.asdict(point))
            timing.warm_up(process, row, row["platform"])
            spent = timing.time_steps(process, row["platform"], effort)
            row |= process.ask(memory=None)
        rate = row["global_batch"] / spent["median"]
        low, high = spent["quartiles"]
        per_device = rate * row["flops_per_image"] / point.devices
        return row | {
            "status": OK,
            "steps": spent["count"],
            "stopped_by_budget": int(spent["count"] < effort.steps),
            "median_seconds": spent["median"],
            "first_quartile_seconds": low,
            "third_quartile_seconds": high,
            "images_per_second": rate,
            "mfu": accelerators.utilization(per_device, row["device"], point.dtype),
            "note": SIMULATION.format(point.devices) if point.simulated else None,
        }

    return measure


def local_devices(simulate: int, limit: float) -> dict:
    """Returns `count` and `platform` of the devices, from a process that releases them again."""
    with _devices_process(simulate, limit) as process:
        return process.ask(devices=None)


def _devices_process(simulate: int, limit: float) -> Process:
    """Starts a worker with that many simulated devices; 0 for the real ones."""
    environment = dict(timing.ENVIRONMENT)
    if simulate:
        name = "--xla_force_host_platform_device_count"
        flags = re.sub(rf"{name}=\d+", "", os.environ.get("XLA_FLAGS", ""))
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {name}={simulate}".strip()}
    return Process(_WORKER, environment=environment, patience=limit)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
