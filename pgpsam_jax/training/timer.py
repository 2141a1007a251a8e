"""Where the time of a run goes: seconds by activity, kept over its restarts."""

import contextlib
import time
from pathlib import Path

from pgpsam_jax.utils.files import read_record, write_json

FILE = "timing.json"


class Stopwatch:
    """`with watch("train"): ...` adds to that activity; an activity inside another interrupts it.

    The totals of the workdir's earlier starts are the beginning, so that a resumed run adds up.
    """

    def __init__(self, workdir):
        self._path, self._running = Path(workdir) / FILE, []
        self.seconds: dict[str, float] = read_record(
            self._path,
            lambda value: {name: float(seconds) for name, seconds in value.items()},
            missing={},
            damaged={},
        )

    @contextlib.contextmanager
    def __call__(self, activity: str):
        self._credit()
        self._running.append(activity)
        try:
            yield
        finally:
            self._credit()
            self._running.pop()

    def _credit(self) -> None:
        """Give the time since the last change to the innermost activity."""
        now = time.perf_counter()
        if self._running:
            activity = self._running[-1]
            self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self._since
        self._since = now

    def store(self) -> None:
        """Write `timing.json` as things stand."""
        self._credit()
        write_json(self._path, {name: round(value, 3) for name, value in self.seconds.items()})
