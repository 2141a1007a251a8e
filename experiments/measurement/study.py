"""Measures the missing points of a folder and keeps a row of each."""

import dataclasses
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from experiments.measurement import csv_table
from experiments.measurement.csv_table import FAILED, Kind
from experiments.measurement.points import Point
from experiments.measurement.worker_process import Failed, end_all


class Study:
    """The rows of one kind in a folder; finished rows are kept. Methods are thread-safe.

    Args:
      folder: of the study.
      kind: of its points.
      measure: returns the row of a point, or raises `Failed`.
      retry: measure failed points again.
    """

    def __init__(self, folder, kind: Kind, measure: Callable[[Point], dict], retry: bool):
        self.folder, self.kind, self.measure, self.retry = folder, kind, measure, retry
        self.rows = csv_table.load(folder, kind)
        self._lock, self._stopped = threading.Lock(), False
        self.keep()  # fails now if the folder cannot be written

    def keep(self, *rows: dict) -> None:
        """Puts rows in the place of those of the same points and stores all rows."""
        with self._lock:
            self.rows |= {self.kind.point_of(row).key: row for row in rows}
            csv_table.store(self.folder, self.kind, self.rows)

    def each(self, function: Callable, points: Iterable[Point], workers: int = 1) -> list:
        """Returns function(point) of every point in order, `workers` at a time."""
        with ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(function, points))
            except BaseException:  # interrupted: unfinished points leave no row
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                end_all()
                raise

    def is_missing(self, point: Point) -> bool:
        """Whether `row` measures the point: it has no row, or failed and `retry`."""
        found = self.rows.get(point.key)
        return not found or (found["status"] == FAILED and self.retry)

    def row(self, point: Point) -> dict:
        """Returns the row of a point; measures it if it is missing."""
        if not self.is_missing(point):
            return self.rows[point.key]
        print(point.key, flush=True)
        row = dataclasses.asdict(point) | {"reason": None}
        try:
            row |= self.measure(point)
        except Failed as failure:
            row |= {"status": FAILED, "reason": str(failure)}
        if self._stopped:
            raise Failed("stopped")
        self.keep(row)
        print(f"  {point.key}: {row['status']}{_detail(row)}", flush=True)
        return row


def _detail(row: dict) -> str:
    if row["reason"]:
        return f": {row['reason']}"
    return f" (compiled in {row['compile_seconds']:.0f} s)" if "compile_seconds" in row else ""
