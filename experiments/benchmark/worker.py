"""A process that runs the steps of one point on request: one line of JSON in, one line out.

Requests: {"prepare": point, "variant": ...}, {"steps": n}, {"memory": null}, {"forget": null},
{"whole": point}. An answer with "error" says what failed; the end of the input ends the process.
"""

import gc
import json
import os
import sys
import time

from experiments.benchmark import memory
from pgpsam_jax.hostmemory import keep_freed_memory


class Worker:
    """The state between requests: the prepared step."""

    def prepare(self, point: dict, framework: str, variant: str) -> dict:
        if framework == "torch":
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
        """Leave out of the peak what preparing took."""
        gc.collect()
        before = memory.peak_resident()
        memory.forget_peak()
        return {"prepare_peak_bytes": before}

    def memory(self, _) -> dict:
        own = self.step.peak_bytes()
        return {"peak_bytes": memory.peak_resident() if own is None else own}

    def whole(self, point: dict) -> dict:
        from experiments.benchmark.whole import measure

        return measure(point)


def serve(framework: str) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                answer = worker.prepare(request["prepare"], framework, request["variant"])
            else:
                ((name, argument),) = request.items()
                answer = getattr(worker, name)(argument)
        except Exception as error:  # any failure of a point is a row of the table
            answer = {"error": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def reason(error: BaseException) -> str:
    """One line for an error; every framework's own of too little memory is called alike."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(
        mark in f"{type(error).__name__} {text}"
        for mark in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory", "can't allocate memory")
    ):
        return f"out of memory: {text[:200]}"
    return f"{type(error).__name__}: {text[:300]}"


if __name__ == "__main__":
    keep_freed_memory()  # on both sides, so that it is no difference between them
    serve(sys.argv[1])
