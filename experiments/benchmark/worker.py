"""Worker process that runs the steps of one point (`measurement/worker_process.py`).

Requests: {"prepare": point, "variant": ...}, {"steps": n}, {"memory": null}, {"forget": null},
{"whole": point}.
"""

import gc
import sys
import time

from experiments.measurement import peak_memory
from experiments.measurement.worker_process import serve
from pgpsam_jax.runtime.malloc import keep_freed_memory


class Worker:
    """Holds the prepared step of a framework, `jax` or `torch`, between requests."""

    def __init__(self, framework: str = "jax"):
        self.framework = framework

    def prepare(self, point: dict, variant: str) -> dict:
        if self.framework == "torch":
            from experiments.benchmark.steps_torch import Step

            self.step = Step(point, variant)
        else:
            from experiments.benchmark.steps_jax import Step

            self.step = Step(point)
        return self.step.facts

    def steps(self, count: int) -> dict:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def forget(self, _) -> dict:
        """Resets the memory peak after preparing."""
        gc.collect()
        before = peak_memory.peak_resident()
        peak_memory.forget_peak()
        return {"prepare_peak_bytes": before}

    def memory(self, _) -> dict:
        own = self.step.peak_bytes()
        return {"peak_bytes": peak_memory.peak_resident() if own is None else own}

    def whole(self, point: dict) -> dict:
        from experiments.benchmark.other_tasks import measure

        return measure(point)


if __name__ == "__main__":
    keep_freed_memory()  # in both frameworks alike
    serve(Worker(sys.argv[1]))
