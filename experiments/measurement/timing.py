"""Times the steps of a worker process."""

import dataclasses

import numpy as np

from experiments.measurement.worker_process import Process
from pgpsam_jax.profiling import accelerators

FEWEST = 5  # timed steps of a point, or turns of a comparison
WARM_UP = {"cpu": 3}  # steps, by platform; 10 elsewhere
COLUMNS = {
    "steps": int,
    "median_seconds": float,
    "first_quartile_seconds": float,
    "third_quartile_seconds": float,
    "images_per_second": float,
    "mfu": float,
    "peak_bytes": float,
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


def prepare(process: Process, step: str, platform: str = "", **arguments) -> dict:
    """Returns the facts of a step that was prepared and warmed up; then resets the peak memory."""
    facts = process.ask(prepare=step, **arguments)
    process.ask(steps=WARM_UP.get(platform or facts["platform"], 10))
    return facts | process.ask(forget=None)


def time_steps(process: Process, platform: str, effort: Effort) -> dict:
    """Returns the columns of `summary` of the prepared step."""
    seconds = []
    while len(seconds) < effort.steps and not effort.suffices(len(seconds), sum(seconds), platform):
        seconds += process.ask(steps=1 if platform == "cpu" else effort.steps)["seconds"]
    return summary(seconds)


def summary(seconds) -> dict:
    """Returns the columns about the time of a step from the seconds of several."""
    low, median, high = quartiles(seconds)
    return {
        "steps": len(seconds),
        "median_seconds": median,
        "first_quartile_seconds": low,
        "third_quartile_seconds": high,
    }


def quartiles(values) -> list[float]:
    return np.percentile(values, (25, 50, 75)).tolist()


def rates(row: dict, images: int, dtype: str, devices: int = 1) -> dict:
    """Returns images/s of steps of so many images, and MFU where the chip's peak is known."""
    rate = images / row["median_seconds"]
    flops = rate * row["flops_per_image"] / devices
    return {"images_per_second": rate, "mfu": accelerators.utilization(flops, row["device"], dtype)}
