"""Times a run: seconds per activity, accumulated over restarts."""

import contextlib
import time
from pathlib import Path

from pgpsam_jax.utils.files import read_record, write_json

FILE = "timing.json"


class Stopwatch:
    """Adds time to activities: `with watch("train"): ...`; a nested activity pauses the outer one.

    Totals continue from the workdir's earlier starts.
    """

    def __init__(self, workdir):
        self._path, self._since = Path(workdir) / FILE, time.perf_counter()
        self._running: list[str] = []
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
        """Adds the time since the last change to the innermost activity."""
        now = time.perf_counter()
        if self._running:
            activity = self._running[-1]
            self.seconds[activity] = self.seconds.get(activity, 0.0) + now - self._since
        self._since = now

    def store(self) -> None:
        """Writes the totals to `timing.json`."""
        self._credit()
        write_json(self._path, {name: round(value, 3) for name, value in self.seconds.items()})
