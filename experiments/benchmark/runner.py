"""Runs points in worker processes and returns their rows.

Each point has a fresh process: the memory peak belongs to it alone, and a failure is a row with its
reason. A comparison with PyTorch has two processes, which take turns.
"""

import dataclasses

import numpy as np

from experiments.benchmark.points import STEPS, Point
from experiments.measurement.timing import ENVIRONMENT, Effort, quartiles, time_steps, warm_up
from experiments.measurement.worker_process import Failed, Process
from pgpsam_jax.profiling import accelerators

_WORKER = "experiments.benchmark.worker"


def measure(point: Point, effort: Effort) -> dict:
    """Returns the row of a point, with `error` if it failed."""
    row = {"key": point.key, "point": dataclasses.asdict(point)}
    try:
        with Process(_WORKER, "jax", environment=ENVIRONMENT) as process:
            if point.task not in STEPS:
                return row | {"record": process.ask(whole=describe(point))}
            row |= process.ask(prepare=describe(point), variant="")
            platform = row["platform"]
            warm_up(process, row, platform)
            if point.against:
                row["torch"] = against(point, process, row, effort)
            else:
                row["seconds"] = time_steps(process, platform, effort)
            row |= process.ask(memory=None)
        return row | rates(row, point)
    except Failed as failure:
        return row | {"error": str(failure)}


def describe(point: Point) -> dict:
    """Returns the point for a worker, with the sizes of SAM for the process without JAX."""
    described = dataclasses.asdict(point) | {"settings": point.settings}
    if point.against:
        from experiments.benchmark.steps_jax import PATCH
        from pgpsam_jax.models.sam.sam import SamConfig

        config = SamConfig.preset(point.encoder, point.image_size, PATCH)
        described["sizes"] = dataclasses.asdict(config)
    return described


def against(point: Point, ours: Process, row: dict, effort: Effort) -> dict:
    """Returns PyTorch's rows by variant, with the ratio to ours; `row` gets our seconds."""
    rows = {}
    for variant in ("eager",) if row["platform"] == "cpu" else ("compile", "eager"):
        try:
            with Process(_WORKER, "torch", environment=ENVIRONMENT) as theirs:
                found = theirs.ask(prepare=describe(point), variant=variant)
                warm_up(theirs, found, row["platform"])
                own, other, ratios = take_turns(ours, theirs, row["platform"], effort)
                found |= {"seconds": quartiles(other), "ratio": quartiles(ratios)}
                found |= theirs.ask(memory=None)
            row.setdefault("seconds", quartiles(own))
        except Failed as failure:
            found = {"error": str(failure)}
        rows[variant] = found
    row.setdefault("seconds", None)
    if row["seconds"] is None:  # PyTorch failed: time ours alone
        row["seconds"] = time_steps(ours, row["platform"], effort)
    return rows


def take_turns(ours: Process, theirs: Process, platform: str, effort: Effort):
    """Runs our steps and theirs alternately.

    A turn is two steps on a CPU and five on an accelerator, after an untimed one: the process was
    idle before, so its memory may be swapped out or the device's clock lowered.

    Returns:
      Seconds of our steps, seconds of theirs, and the ratio theirs / ours of each turn.
    """
    own, other, ratios, turn = [], [], [], 2 if platform == "cpu" else 5
    while len(own) < effort.steps and not effort.suffices(
        len(ratios), sum(own) + sum(other), platform
    ):
        pair = []
        for process, seconds in ((ours, own), (theirs, other)):
            process.ask(steps=1)
            latest = process.ask(steps=turn)["seconds"]
            pair.append(float(np.median(latest)))
            seconds += latest
        ratios.append(pair[1] / pair[0])
    return own, other, ratios


def rates(row: dict, point: Point) -> dict:
    """Returns images and FLOPs per second, and MFU where the chip's peak is known."""
    images = point.batch_size / row["seconds"]["median"]
    flops = images * row["flops_per_image"]["needed"]
    return {
        "images_per_second": images,
        "flops_per_second": flops,
        "mfu": accelerators.utilization(flops, row["device"], point.dtype),
    }
