"""Worker process of all measurements (`worker_process.py`).

Requests: {"prepare": "module:Step", ...}, {"steps": n}, {"memory": null}, {"forget": null} and
{"call": "module:function", ...}; the rest of a request are the arguments of what it names.
"""

import gc
import importlib
import time

from experiments.measurement import peak_memory
from experiments.measurement.worker_process import serve
from pgpsam_jax.runtime.malloc import keep_freed_memory


class Worker:
    """Holds a prepared step between requests: a callable with `facts` and `peak_bytes()`."""

    def call(self, name: str, **arguments) -> dict:
        return _find(name)(**arguments)

    def prepare(self, name: str, **arguments) -> dict:
        self.step = _find(name)(**arguments)
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


def _find(name: str):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    keep_freed_memory()  # as a run does, in all frameworks alike
    serve(Worker())
