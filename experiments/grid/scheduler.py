"""Runs the cells of an experiment grid in parallel and ends them with itself."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from tqdm import tqdm

from experiments.grid.device_assignment import assign_devices
from experiments.run_cell import BUSY, DIED, standing, write_state
from pgpsam_jax.checkpointing.provenance import code_version
from pgpsam_jax.config import defaults, serialization
from pgpsam_jax.errors import AGAIN, SIGNALED, Interrupted
from pgpsam_jax.results.grid import DONE, FAILED, PENDING, RUNNING, Cell, Grid
from pgpsam_jax.utils.files import read_metrics

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 30.0  # for the current step and its checkpoint


class Scheduler:
    """Keeps `workers` cells running until all are done, too many fail, or a signal stops it."""

    def __init__(self, grid: Grid, cells: list[Cell], workers: int, max_failures: int | None):
        self.grid, self.cells, self.workers = grid, cells, workers
        self.max_failures = max_failures if max_failures is not None else len(cells) + 1
        self.waiting = [cell for cell in cells if standing(cell) not in (DONE, RUNNING)]
        self.running: dict[int, tuple[Cell, subprocess.Popen]] = {}  # slot -> cell, process
        self.failed: list[str] = []
        self.devices = assign_devices(workers)
        self._bar = tqdm(
            total=len(cells),
            desc=grid.name,
            bar_format="{desc}: {n:.2f} of {total} cells |{bar}| {elapsed} spent, {remaining} left",
            mininterval=1 if sys.stderr.isatty() else 60,
            miniters=0,
        )

    def run(self) -> bool:
        """Runs the cells; returns whether all are done."""
        with _interrupted(), self._bar:
            try:
                self._bar.n = self._bar.initial = self._progress()
                while self.running or self._may_start():
                    self._start()
                    time.sleep(_POLL_SECONDS)
                    self._collect()
                    self._bar.update(self._progress() - self._bar.n)
            finally:
                self._stop()
        return all(cell.state["state"] == DONE for cell in self.cells)

    def _may_start(self) -> bool:
        return bool(self.waiting) and len(self.failed) < self.max_failures

    def _start(self) -> None:
        for slot in range(self.workers):
            if slot in self.running or not self._may_start():
                continue
            if code_version()["code"] != self.grid.code["code"]:
                self._bar.write("the code of pgpsam_jax has changed: no further cell is started")
                self.waiting.clear()
                return
            cell = self.waiting.pop(0)
            again = standing(cell)
            self.running[slot] = cell, self._launch(cell, slot)
            words = {DIED: ", resumed", FAILED: ", retried"}
            self._bar.write(f"{cell.name} started{words.get(again, '')}")

    def _launch(self, cell: Cell, slot: int) -> subprocess.Popen:
        cell.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", "-m", "experiments.run_cell", "--attached"]
        command += ["--workdir", str(self.grid.path), "--cell", cell.name]
        variables, cores = self.devices[slot]
        with open(cell.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | variables,
                start_new_session=True,  # Ctrl-C reaches the scheduler, which ends its cells
            )
        if cores:
            os.sched_setaffinity(process.pid, cores)
        return process

    def _collect(self) -> None:
        for slot, (cell, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[slot]
            process.communicate()  # closes its input
            state = cell.state
            if code == BUSY:
                self._bar.write(f"{cell.name} runs in another process; left alone")
            elif code == AGAIN:
                self._bar.write(f"{cell.name} was stopped by a signal; the same command resumes it")
            elif state["state"] == DONE:
                self._bar.write(f"{cell.name} done in {state['seconds']:.0f} s")
            else:
                if state["state"] != FAILED:  # it died without saying so
                    write_state(cell.folder, FAILED, reason=_ended(code))
                self.failed.append(cell.name)
                self._bar.write(
                    f"{cell.name} failed: {cell.state['reason']} (see {cell.folder}/log.txt)"
                )

    def _stop(self) -> None:
        """Ends running cells, which become pending and resume from their checkpoints."""
        for _, process in self.running.values():
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for cell, process in self.running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if cell.state["state"] not in (DONE, FAILED):
                write_state(cell.folder, PENDING, note="stopped")

    def _progress(self) -> float:
        return sum(_share_done(cell) for cell in self.cells)


def _share_done(cell: Cell) -> float:
    """Returns the progress of a cell from 0 to 1; finished and failed ones count as 1."""
    state = cell.state["state"]
    if state in (DONE, FAILED):
        return 1.0
    records = read_metrics(cell.folder / "metrics.jsonl")
    if not records:
        return 0.0
    lines = (cell.folder / "fewshot.txt").read_text(encoding="utf-8").splitlines()
    slices = sum(not line.startswith("#") for line in lines)
    train = serialization.from_json(cell.config).train
    total = defaults.total_steps(train.steps, train.epochs, train.batch_size, slices)
    return 0.9 * min(1.0, records[-1]["step"] / total)  # the rest is evaluation


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; often because the system ran out of memory" if name == "SIGKILL" else ""
    return f"ended by {name}{hint}"


@contextlib.contextmanager
def _interrupted():
    """Ends the block on Ctrl-C, SIGTERM and SIGHUP, and the cells with it."""

    def interrupt(number, _):
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}; the same command resumes",
            code=SIGNALED + number,
        )

    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        handled.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
