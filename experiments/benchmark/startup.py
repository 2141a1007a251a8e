"""Times the imports of a command, with JAX apart; needs no JAX in this process."""

import subprocess
import sys

from experiments.measurement.timing import quartiles

_IMPORTS = {
    "jax": "",
    "pgpsam_jax.training.train": "import jax",
}  # timed module -> untimed code before it
_PROGRAM = """
{before}
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def startup_benchmark(repeats: int = 7) -> dict:
    """Returns quartiles of the seconds to import `jax`, and then `training.train`.

    Each import runs in a fresh interpreter, the two alternately, after an untimed round that writes
    the byte code and fills the file cache.
    """
    seconds: dict[str, list[float]] = {module: [] for module in _IMPORTS}
    for _ in range(repeats + 1):
        for module, before in _IMPORTS.items():
            seconds[module].append(_import_seconds(module, before))
    return {
        "repeats": repeats,
        "seconds": {module: quartiles(values[1:]) for module, values in seconds.items()},
    }


def _import_seconds(module: str, before: str) -> float:
    command = [sys.executable, "-c", _PROGRAM.format(module=module, before=before)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
