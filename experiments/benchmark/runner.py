"""Runs points in worker processes and returns their rows.

Each point has a fresh process: the memory peak belongs to it alone, and a failure is a row with its
reason. A comparison with PyTorch has two processes, which take turns.
"""

import dataclasses

import numpy as np

from experiments.benchmark.points import STEPS, Point
from experiments.measurement import timing
from experiments.measurement.csv_table import FAILED, OK, TOO_LARGE
from experiments.measurement.timing import Effort
from experiments.measurement.worker_process import Failed, Process

TASKS = {  # not steps -> function of `experiments.benchmark`
    "matmul": "matmul:matmul_benchmark",
    "scoring": "scoring:scoring_benchmark",
    "startup": "startup:startup_benchmark",
    "loop": "train_loop:loop_benchmark",
    "run": "train_loop:run_benchmark",
    "encoded": "feature_cache:encoded_benchmark",
    "encoded_flops": "feature_cache:encoded_flops",
}


def measure(point: Point, effort: Effort) -> dict:
    """Returns status and results of a point."""
    given = {} if point.task in ("scoring", "startup") else {"point": dataclasses.asdict(point)}
    try:
        with Process() as process:
            if point.task not in STEPS:
                name = f"experiments.benchmark.{TASKS[point.task]}"
                return {"status": OK, "record": process.ask(call=name, **given)}
            row = timing.prepare(process, "experiments.benchmark.steps_jax:Step", **given)
            if point.against:
                row["torch"] = against(point, process, row, effort)
            else:
                row |= timing.time_steps(process, row["platform"], effort)
            row |= process.ask(memory=None)
        return {"status": OK} | row | timing.rates(row, point.batch, point.dtype)
    except Failed as failure:
        status = TOO_LARGE if str(failure).startswith("out of memory") else FAILED
        return {"status": status, "reason": str(failure)}


def sizes_of(point: Point) -> dict:
    """Returns the sizes of SAM, for the process without JAX."""
    from pgpsam_jax.models.sam.sam import SamConfig

    config = SamConfig.preset(point.encoder, point.image_size, point.patch_size)
    return dataclasses.asdict(config)


def against(point: Point, ours: Process, row: dict, effort: Effort) -> dict:
    """Returns PyTorch's rows by variant, with the ratio to ours; `row` gets our seconds."""
    rows, platform = {}, row["platform"]
    given = {"point": dataclasses.asdict(point), "sizes": sizes_of(point)}
    variants = ["eager"] if platform == "cpu" else ["compile", "eager"]
    if point.encoder == "tiny_vit":  # of convolutions
        variants.append("channels-last")
    for variant in variants:
        try:
            with Process() as theirs:
                step = "experiments.benchmark.steps_torch:Step"
                found = timing.prepare(theirs, step, platform, **given, variant=variant)
                own, other, ratios = take_turns(ours, theirs, platform, effort)
                found |= timing.summary(other) | theirs.ask(memory=None)
                found |= {"turns": len(ratios), "ratio": timing.quartiles(ratios)}
            row |= {} if "steps" in row else timing.summary(own)
        except Failed as failure:
            found = {"error": str(failure)}
        rows[variant] = found
    if "steps" not in row:  # PyTorch failed: time ours alone
        row |= timing.time_steps(ours, platform, effort)
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
