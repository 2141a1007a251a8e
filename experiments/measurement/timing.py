"""Warm-up and repeated timing of the steps of a worker process."""

import dataclasses

import numpy as np

from experiments.measurement.worker_process import Process

FEWEST = 5  # timed steps of a point, or turns of a comparison
WARM_UP = {"cpu": 3}  # steps, by platform; 10 elsewhere
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else the peak is the preallocated pool
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # else the compile time is that of reading the cache
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a point is timed.

    steps: timed steps, at most. budget: seconds after which `FEWEST` steps are enough on a CPU.
    """

    steps: int = 50
    budget: float = 30.0

    def suffices(self, turns: int, seconds: float, platform: str) -> bool:
        """Whether a CPU has spent its budget; an accelerator always takes all steps."""
        return platform == "cpu" and turns >= FEWEST and seconds > self.budget


def warm_up(process: Process, row: dict, platform: str) -> None:
    """Runs untimed steps, then resets the peak of the memory."""
    process.ask(steps=WARM_UP.get(platform, 10))
    row |= process.ask(forget=None)


def time_steps(process: Process, platform: str, effort: Effort) -> dict:
    """Returns median, quartiles and count of the seconds per step."""
    seconds = []
    while len(seconds) < effort.steps and not effort.suffices(len(seconds), sum(seconds), platform):
        seconds += process.ask(steps=1 if platform == "cpu" else effort.steps)["seconds"]
    return quartiles(seconds)


def quartiles(values) -> dict:
    """Returns median, quartiles and number of values."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high], "count": len(values)}
