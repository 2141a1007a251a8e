"""Worker process that compiles or runs one point (`measurement/worker_process.py`).

Requests: {"devices": null}, {"compile_point": point}, {"prepare": point}, and {"steps": n},
{"forget": null}, {"memory": null} as of the benchmark.
"""

from experiments.benchmark import worker
from experiments.measurement.worker_process import serve


class Worker(worker.Worker):
    """Holds the prepared step between requests."""

    def devices(self, _) -> dict:
        import jax

        found = jax.local_devices()
        return {"count": len(found), "platform": found[0].platform}

    def compile_point(self, point: dict) -> dict:
        from experiments.scaling.compiled import compile_point
        from experiments.scaling.points import Compiled

        return compile_point(Compiled(**point))

    def prepare(self, point: dict) -> dict:
        from experiments.scaling.measured import Step
        from experiments.scaling.points import Measured

        self.step = Step(Measured(**point))
        return self.step.facts


if __name__ == "__main__":
    serve(Worker())
