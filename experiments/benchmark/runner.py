"""Runs points in processes of their own and makes their rows.

Every point has a fresh process, so that the peak of memory is its own and one that fails is a row
with its reason. Against PyTorch there are two, which take turns.
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from experiments.benchmark.points import STEPS, Point
from pgpsam_jax import chips

_REPOSITORY = Path(__file__).parents[2]
_PATIENCE = 1800  # seconds for one answer
_FEWEST = 5  # timed steps of a point, or turns of a comparison
WARM_UP = {"cpu": 3}  # steps, by platform; 10 elsewhere
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else the peak is what was set aside
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # else the seconds of compiling are those of reading
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class Failed(Exception):
    """A point's reason for having no figures."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How many timed steps, at most; and, on a CPU, the seconds after which fewer do."""

    steps: int = 50
    budget: float = 30.0


class Process:
    """A worker: `ask` sends it a request and returns its answer."""

    def __init__(self, framework: str):
        self._errors = tempfile.TemporaryFile("w+")
        paths = [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark.worker", framework],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def ask(self, **request) -> dict:
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], _PATIENCE)[0]:
                raise Failed(f"no answer in {_PATIENCE} s")
            line = self._process.stdout.readline()
        if not line:
            raise Failed(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _death(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "out of memory: the system killed the process"
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"the process ended with code {code}: {lines[-1][:200] if lines else 'no message'}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()


def measure(point: Point, effort: Effort) -> dict:
    """The row of a point, with `error` where it failed."""
    row = {"key": point.key, "point": dataclasses.asdict(point)}
    try:
        with Process("jax") as process:
            if point.task not in STEPS:
                return row | {"record": process.ask(whole=describe(point))}
            row |= process.ask(prepare=describe(point), variant="")
            platform = row["platform"]
            warm(process, row, platform)
            if point.against:
                row["torch"] = against(point, process, row, effort)
            else:
                row["seconds"] = timed(process, platform, effort)
            row |= process.ask(memory=None)
        return row | rates(row, point)
    except Failed as failure:
        return row | {"error": str(failure)}


def describe(point: Point) -> dict:
    """The point as a worker takes it; the sizes of SAM go to the process without JAX."""
    described = dataclasses.asdict(point) | {"settings": point.settings}
    if point.against:
        from experiments.benchmark.steps_jax import PATCH
        from pgpsam_jax.models.sam import SamConfig

        config = SamConfig.preset(point.encoder, point.image_size, PATCH)
        described["sizes"] = dataclasses.asdict(config)
    return described


def warm(process: Process, row: dict, platform: str) -> None:
    """Steps that are not timed; then the mark of the memory begins anew."""
    process.ask(steps=WARM_UP.get(platform, 10))
    row |= process.ask(forget=None)


def timed(process: Process, platform: str, effort: Effort) -> dict:
    """Median and quartiles of the seconds of a step."""
    seconds = []
    while len(seconds) < effort.steps and not _enough(len(seconds), sum(seconds), platform, effort):
        seconds += process.ask(steps=1 if platform == "cpu" else effort.steps)["seconds"]
    return spread(seconds)


def _enough(turns: int, seconds: float, platform: str, effort: Effort) -> bool:
    return platform == "cpu" and turns >= _FEWEST and seconds > effort.budget


def spread(values) -> dict:
    """Median, quartiles and number of values."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high], "count": len(values)}


def against(point: Point, ours: Process, row: dict, effort: Effort) -> dict:
    """PyTorch's rows by variant, each with its ratio to us; `row` gets our seconds."""
    rows = {}
    for variant in ("eager",) if row["platform"] == "cpu" else ("compile", "eager"):
        try:
            with Process("torch") as theirs:
                found = theirs.ask(prepare=describe(point), variant=variant)
                warm(theirs, found, row["platform"])
                own, other, ratios = take_turns(ours, theirs, row["platform"], effort)
                found |= {"seconds": spread(other), "ratio": spread(ratios)}
                found |= theirs.ask(memory=None)
            row.setdefault("seconds", spread(own))
        except Failed as failure:
            found = {"error": str(failure)}
        rows[variant] = found
    row.setdefault("seconds", None)
    if row["seconds"] is None:  # no counterpart ran: ours are still worth having
        row["seconds"] = timed(ours, row["platform"], effort)
    return rows


def take_turns(ours: Process, theirs: Process, platform: str, effort: Effort):
    """Seconds of our steps and of theirs, run alternately, and of each turn theirs over ours.

    A turn is two steps on a CPU, five on an accelerator, after one that is not timed: the process
    was idle in between, and the system may have taken its memory or the device its clock.
    """
    own, other, ratios, turn = [], [], [], 2 if platform == "cpu" else 5
    while len(own) < effort.steps and not _enough(
        len(ratios), sum(own) + sum(other), platform, effort
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
    """Images and FLOPs per second, and the share of the chip's peak where it is known."""
    images = point.batch_size / row["seconds"]["median"]
    flops = images * row["flops_per_image"]["needed"]
    return {
        "images_per_second": images,
        "flops_per_second": flops,
        "mfu": chips.utilisation(flops, row["device"], point.dtype),
    }
