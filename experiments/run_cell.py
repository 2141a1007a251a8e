"""One cell of a grid, as a process of its own: claim, run or resume, and leave a state behind.

The grid driver starts it; in a SLURM array it is started directly:
  python -m experiments.run_cell --workdir runs/table3 --cell ppr-seed0

`state.json` says running (pid, host, heartbeat), done, failed (reason) or pending again, where a
signal has stopped it (exit code `errors.AGAIN`). The claim is a lock on the cell's `lock` file,
which the system releases when the process dies, however it dies.
"""

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from pgpsam_jax.checkpointing import workdir_lock
from pgpsam_jax.checkpointing.provenance import code_version
from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.errors import AGAIN, Interrupted, UserError, exit_on_user_error
from pgpsam_jax.results.grid import DONE, FAILED, PENDING, RUNNING, STATE, Cell, read_grid
from pgpsam_jax.runtime import preemption
from pgpsam_jax.runtime.malloc import keep_freed_memory
from pgpsam_jax.utils.files import write_json

try:
    import fcntl
except ImportError:  # no such locks on this system: the heartbeat alone tells
    fcntl = None

HEARTBEAT_SECONDS = 10
STALE_SECONDS = 120  # without a heartbeat, a cell of another host counts as dead
BUSY = 73  # exit code: another process runs this cell
DIED = "died"


def standing(cell: Cell) -> str:
    """pending, running, done, failed, or died: recorded as running by a process that is gone."""
    state = cell.state
    if state["state"] != RUNNING:
        return state["state"]
    if fcntl is not None and state["host"] == socket.gethostname():
        with _locked(cell.folder) as free:
            if free is not None:
                return DIED if free else RUNNING
    return RUNNING if time.time() - state["heartbeat"] < STALE_SECONDS else DIED


def write_state(folder: Path, state: str, **fields) -> None:
    write_json(folder / STATE, {"state": state, **fields})


@contextlib.contextmanager
def _locked(folder: Path):
    """Whether the cell's lock is ours inside the block; None where there are no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        yield _free(file)


def _free(file) -> bool | None:
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in workdir_lock.NO_LOCKS:
            return None
        raise
    return True


def run(cell: Cell) -> int:
    """Run the cell to its end; the exit code: 0 done, 1 or 2 failed, BUSY if it is running,
    AGAIN if a signal has stopped it."""
    with _locked(cell.folder) as free:
        if free is False or standing_elsewhere(cell):
            print(f"{cell.name} is being run by another process", file=sys.stderr)
            return BUSY
        if cell.state["state"] == DONE:
            return 0
        started = time.time()
        with _heartbeat(cell.folder, started):
            reason, code = _train(cell)
        seconds = round(time.time() - started, 1)
        if code == AGAIN:
            write_state(cell.folder, PENDING, note="stopped")
        elif reason is None:
            write_state(cell.folder, DONE, seconds=seconds, **code_version())
        else:
            write_state(cell.folder, FAILED, reason=reason, seconds=seconds)
        return code


def standing_elsewhere(cell: Cell) -> bool:
    """Whether another host, whose lock may not reach us, runs the cell."""
    state = cell.state
    return (
        state["state"] == RUNNING
        and state["host"] != socket.gethostname()
        and time.time() - state["heartbeat"] < STALE_SECONDS
    )


def _train(cell: Cell) -> tuple[str | None, int]:
    """(reason of failure or None, exit code)."""
    from pgpsam_jax.runtime.compilation_cache import keep_compiled, start
    from pgpsam_jax.training import train  # JAX: not before the claim

    keep_compiled()
    try:
        start()
        train.train(configuration.from_json(cell.config), cell.folder)
    except Interrupted as error:
        print(f"stopped: {error}", file=sys.stderr)
        return str(error), AGAIN
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return str(error), 2
    except Exception as error:
        traceback.print_exc()
        first = str(error).splitlines()[0] if str(error) else ""
        return f"{type(error).__name__}: {first}"[:500], 1
    return None, 0


@contextlib.contextmanager
def _heartbeat(folder: Path, started: float):
    """Say `running` now and every few seconds while the block runs."""
    stop = threading.Event()
    fields = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}

    def beat():
        while not stop.is_set():
            with contextlib.suppress(OSError):  # a full disk shows in the run itself
                write_state(folder, RUNNING, **fields, heartbeat=time.time())
            stop.wait(HEARTBEAT_SECONDS)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _end_with_parent() -> None:
    """End this process when the driver does: its end of our standard input closes then."""

    def watch():
        with contextlib.suppress(OSError):
            while os.read(0, 1):  # sys.stdin's own lock would be held at exit
                pass
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.run_cell", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of the grid")
    parser.add_argument("--cell", required=True, help="name of the cell, as in grid.json")
    parser.add_argument(
        "--attached", action="store_true", help="end when standard input closes (the driver's)"
    )
    arguments = parser.parse_args()
    if arguments.attached:
        _end_with_parent()
    with exit_on_user_error(), preemption.listening():
        cells = {cell.name: cell for cell in read_grid(arguments.workdir).cells}
        if arguments.cell not in cells:
            raise UserError(
                f"{arguments.workdir}/grid.json has no cell {arguments.cell!r}; it has "
                + ", ".join(cells)
            )
        sys.exit(run(cells[arguments.cell]))


if __name__ == "__main__":
    keep_freed_memory()
    main()
