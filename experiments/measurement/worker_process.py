"""Runs measurements in a fresh subprocess: one line of JSON in, one line out.

A request names a method of the worker and its arguments, the first under the method's name:
{"steps": 5}, {"prepare": "module:Step", "point": ...}. An answer with "error" says what failed; the
process ends with its input.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pgpsam_jax.errors import UserError

ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # else the peak is the preallocated pool
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # else the compile time is that of reading the cache
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_REPOSITORY = Path(__file__).parents[2]
_alive: set["Process"] = set()


class Failed(Exception):
    """A point could not be measured."""


class Process:
    """A process of `worker.py`; `ask` returns its answers.

    Args:
      environment: variables in addition to those of this process and `ENVIRONMENT`.
      patience: seconds to wait for an answer.
    """

    def __init__(self, environment: dict[str, str] | None = None, patience: float = 1800):
        self._patience = patience
        self._errors = tempfile.TemporaryFile("w+")
        paths = [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.measurement.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | ENVIRONMENT | (environment or {}) | paths,
            start_new_session=True,  # Ctrl-C reaches the parent only
        )
        _alive.add(self)

    def ask(self, **request) -> dict:
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], self._patience)[0]:
                raise Failed(f"no answer in {self._patience:g} s")
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

    def kill(self) -> None:
        self._process.kill()

    def __exit__(self, *_):
        self.kill()
        self._process.wait()
        _alive.discard(self)
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()


def end_all() -> None:
    """Kills all processes; pending calls of `ask` raise `Failed`."""
    for process in list(_alive):
        process.kill()


def serve(worker) -> None:
    """Answers requests with the worker's methods, which return dictionaries, until input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stderr, not among the answers
    for line in sys.stdin:
        try:
            (name, first), *rest = json.loads(line).items()
            answer = getattr(worker, name)(first, **dict(rest))
        except Exception as error:  # any failure of a point is a row of the table
            answer = {"error": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def reason(error: BaseException) -> str:
    """Returns one line for an error, and the same prefix for every out-of-memory error."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(
        mark in f"{type(error).__name__} {text}"
        for mark in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory", "can't allocate memory")
    ):
        return f"out of memory: {text[:200]}"
    if isinstance(error, UserError):
        return text
    text = text.partition(" (set JAX_PLATFORMS")[0]
    return f"{type(error).__name__}: {text[:300]}"
