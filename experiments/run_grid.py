"""Run all cells of a grid, several at a time; again, and only what is not done is run.

python -m experiments.run_grid --grid experiments/grids/table3.py:phantom --workdir runs/table3

A cell is a run folder `<row>-seed<n>-<hash of its settings>` with its own log. A cell that died is
resumed from its last checkpoint; one that failed is tried again. Exit code 0: all done.
"""

import argparse
import contextlib
import fnmatch
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from experiments import slurm
from experiments.plan import make_grid, parse_settings, settle
from experiments.run_cell import BUSY, DIED, standing, write_state
from pgpsam_jax import config as configuration
from pgpsam_jax.errors import UserError, exit_on_user_error
from pgpsam_jax.files import write_text
from pgpsam_jax.provenance import code_version
from pgpsam_jax.runs import DONE, FAILED, PENDING, RUNNING, Cell, Grid, read_metrics

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0


class Driver:
    """Keeps `workers` cells running until none is left, failures are too many, or it is told."""

    def __init__(self, grid: Grid, cells: list[Cell], workers: int, max_failures: int | None):
        self.grid, self.cells, self.workers = grid, cells, workers
        self.max_failures = max_failures if max_failures is not None else len(cells) + 1
        self.waiting = [cell for cell in cells if standing(cell) not in (DONE, RUNNING)]
        self.running: dict[int, tuple[Cell, subprocess.Popen]] = {}  # slot -> cell, process
        self.failed: list[str] = []
        self.places = _places(workers)
        self._bar = tqdm(
            total=len(cells),
            desc=grid.name,
            bar_format="{desc}: {n:.2f} of {total} cells |{bar}| {elapsed} spent, {remaining} left",
            mininterval=1 if sys.stderr.isatty() else 60,
            miniters=0,
        )

    def run(self) -> bool:
        """True when every cell is done."""
        with _terminated_as_interrupt(), self._bar:
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
                self._bar.write("the code of pgpsam_jax was changed: no further cell is started")
                self.waiting.clear()
                return
            cell = self.waiting.pop(0)
            again = standing(cell)
            self.running[slot] = cell, self._launch(cell, slot)
            words = {DIED: ", taken up again", FAILED: ", tried again"}
            self._bar.write(f"{cell.name} started{words.get(again, '')}")

    def _launch(self, cell: Cell, slot: int) -> subprocess.Popen:
        cell.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", "-m", "experiments.run_cell", "--attached"]
        command += ["--workdir", str(self.grid.path), "--cell", cell.name]
        cache = str((self.grid.path / "compiled").absolute())
        environment = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
        variables, cores = self.places[slot]
        with open(cell.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment | variables,
                start_new_session=True,  # Ctrl-C reaches the driver, which ends its cells
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
            process.stdin.close()
            state = cell.state
            if code == BUSY:
                self._bar.write(f"{cell.name} is run by another process: left to it")
            elif state["state"] == DONE:
                self._bar.write(f"{cell.name} done in {state['seconds']:.0f} s")
            else:
                if state["state"] != FAILED:  # it could not say so itself
                    write_state(cell.folder, FAILED, reason=_ended(code))
                self.failed.append(cell.name)
                self._bar.write(
                    f"{cell.name} failed: {cell.state['reason']} (see {cell.folder}/log.txt)"
                )

    def _stop(self) -> None:
        """End what still runs; those cells are pending again and resume from their checkpoint."""
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
    """0 to 1: steps taken of a started cell, done cells whole; failed ones have nothing to go."""
    state = cell.state["state"]
    if state in (DONE, FAILED):
        return 1.0
    records = read_metrics(cell.folder / "metrics.jsonl")
    if not records:
        return 0.0
    lines = (cell.folder / "fewshot.txt").read_text(encoding="utf-8").splitlines()
    slices = sum(not line.startswith("#") for line in lines)
    total = configuration.total_steps(configuration.from_json(cell.config), slices)
    return 0.9 * min(1.0, records[-1]["step"] / total)  # the rest is evaluation


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; often the system running out of memory" if name == "SIGKILL" else ""
    return f"ended by {name}{hint}"


def _places(workers: int) -> list[tuple[dict, set | None]]:
    """(environment, cores) of every worker: a share of the GPUs, or of the cores without any."""
    if workers == 1:
        return [({}, None)]
    gpus = _gpus()
    if gpus:
        share = len(gpus) // workers
        if share == 0:
            raise UserError(
                f"--workers {workers} on {len(gpus)} GPU(s): one cell needs one; use at most "
                f"--workers {len(gpus)}"
            )
        parts = [gpus[i * share : (i + 1) * share] for i in range(workers)]
        return [({"CUDA_VISIBLE_DEVICES": ",".join(part)}, None) for part in parts]
    if not hasattr(os, "sched_setaffinity"):
        return [({}, None)] * workers
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise UserError(f"--workers {workers} on {len(cores)} core(s); use at most one per core")
    return [({}, set(cores[i::workers])) for i in range(workers)]


def _gpus() -> list[str]:
    """Ids of the NVIDIA GPUs this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [part for part in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if part]
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        found = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
        return [str(i) for i in range(len(found))]
    return []


@contextlib.contextmanager
def _terminated_as_interrupt():
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that cells are ended with it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listing(grid: Grid, cells: list[Cell]) -> str:
    """What `--dry-run` prints: every cell with its state and folder."""
    lines = [f"{grid.name}: {grid.title}", f"{len(cells)} cells in {grid.path}"]
    for cell in cells:
        state = cell.state
        detail = state.get("reason") or state.get("note") or ""
        lines.append(f"{standing(cell):8} {cell.name:28} {cell.folder.name}  {detail}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.run_grid", description=__doc__)
    parser.add_argument("--grid", required=True, help="grid file, its variant behind a colon")
    parser.add_argument("--workdir", required=True, help="folder of the grid")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and run nothing")
    parser.add_argument("--max-failures", type=int, help="stop after so many failed cells")
    parser.add_argument("--only", default="*", help="cells whose name fits, such as 'ppr-*'")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting for all cells"
    )
    parser.add_argument(
        "--mix", action="store_true", help="go on although settings or code have changed"
    )
    parser.add_argument("--slurm", action="store_true", help="write a job-array script instead")
    arguments = parser.parse_args()
    with exit_on_user_error():
        sys.exit(_run(arguments))


def _run(arguments) -> int:
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be 1 or more")
    folder = Path(arguments.workdir)
    settings = {"data.cache_dir": str(folder / "cache")} | parse_settings(arguments.set)
    grid = make_grid(arguments.grid, folder, settings)
    cells = [cell for cell in grid.cells if fnmatch.fnmatch(cell.name, arguments.only)]
    if not cells:
        names = ", ".join(cell.name for cell in grid.cells)
        raise UserError(f"--only {arguments.only!r} fits no cell; there are {names}")
    if arguments.dry_run:
        print(listing(grid, cells))
        return 0
    settle(grid, arguments.mix)
    if arguments.slurm:
        todo = [cell for cell in cells if standing(cell) not in (DONE, RUNNING)]
        path = folder / "slurm.sh"
        write_text(path, slurm.script(grid, todo, arguments.workers))
        print(f"{path}: {len(todo)} cells; submit it with sbatch {path}")
        return 0
    driver = Driver(grid, cells, arguments.workers, arguments.max_failures)
    try:
        complete = driver.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    print(listing(grid, cells))
    return 0 if complete else 1


if __name__ == "__main__":
    main()
