"""Runs or resumes one cell of an experiment grid and records its state.

The scheduler starts it, or a SLURM array. `state.json` says running (pid, host), done, failed
(reason) or, after a signal, pending again (exit code `errors.AGAIN`). A cell is a workdir: whoever
holds its lock runs it.

Examples:
  python -m experiments.run_cell --workdir runs/table3 --cell ppr-seed0
"""

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
from pgpsam_jax.config import serialization
from pgpsam_jax.errors import AGAIN, Interrupted, UserError, exit_on_user_error
from pgpsam_jax.results.grid import DONE, FAILED, PENDING, RUNNING, STATE, Cell, read_grid
from pgpsam_jax.runtime import preemption
from pgpsam_jax.runtime.cli import Parser
from pgpsam_jax.runtime.malloc import keep_freed_memory
from pgpsam_jax.utils.files import write_json

HEARTBEAT_SECONDS = 10
BUSY = 73  # exit code: another process runs this cell
DIED = "died"


def standing(cell: Cell) -> str:
    """Returns pending, running, done, failed, or died: running, but its process is gone."""
    state = cell.state["state"]
    return DIED if state == RUNNING and not workdir_lock.is_held(cell.folder) else state


def write_state(folder: Path, state: str, **fields) -> None:
    write_json(folder / STATE, {"state": state, **fields})


def run(cell: Cell) -> int:
    """Runs a cell to its end.

    Returns:
      The exit code: 0 done, 1 or 2 failed, BUSY where another process runs it, AGAIN where a signal
      has stopped it.
    """
    try:
        if standing(cell) == RUNNING:  # perhaps on a host that the lock does not reach
            raise workdir_lock.Taken(f"{cell.name} runs in another process")
        with workdir_lock.hold(cell.folder, "running this cell"):
            return _run(cell)
    except workdir_lock.Taken as error:
        print(error, file=sys.stderr)
        return BUSY


def _run(cell: Cell) -> int:
    if cell.state["state"] == DONE:
        return 0
    started = time.time()
    write_state(cell.folder, RUNNING, pid=os.getpid(), host=socket.gethostname(), started=started)
    with _heartbeat(cell.folder):
        reason, code = _train(cell)
    seconds = round(time.time() - started, 1)
    if code == AGAIN:
        write_state(cell.folder, PENDING, note="stopped")
    elif reason is None:
        write_state(cell.folder, DONE, seconds=seconds, **code_version())
    else:
        write_state(cell.folder, FAILED, reason=reason, seconds=seconds)
    return code


def _train(cell: Cell) -> tuple[str | None, int]:
    """(reason of failure or None, exit code)."""
    from pgpsam_jax.runtime.compilation_cache import keep_compiled, start
    from pgpsam_jax.training import train  # JAX: not before the claim

    keep_compiled()
    try:
        start()
        train.train(serialization.from_json(cell.config), cell.folder)
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
def _heartbeat(folder: Path):
    """Keeps the lock's holder file fresh inside the block, see `workdir_lock.is_held`."""
    stop = threading.Event()

    def beat():
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk shows in the run itself
                os.utime(folder / workdir_lock.HOLDER)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _end_with_parent() -> None:
    """Ends this process when the scheduler does, whose end of our standard input then closes."""

    def watch():
        with contextlib.suppress(OSError):
            while os.read(0, 1):  # sys.stdin's own lock would be held at exit
                pass
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = Parser("experiments.run_cell", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the grid")
    parser.add_argument("--cell", required=True, help="name of the cell in grid.json")
    parser.add_argument(
        "--attached", action="store_true", help="end when standard input closes (the scheduler's)"
    )
    with exit_on_user_error(), preemption.handle_signals():
        arguments = parser.parse_args()
        if arguments.attached:
            _end_with_parent()
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
