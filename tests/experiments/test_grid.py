"""Grids: the driver with real cells, death and resumption, SLURM."""

import errno
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import filelock
import pytest

from experiments import run_cell, run_grid
from experiments.grid import device_assignment, scheduler
from experiments.grid.plan import make_grid, write_plan
from experiments.grid.slurm import script
from experiments.run_cell import BUSY, DIED, run, standing, write_state
from pgpsam_jax.checkpointing import workdir_lock
from pgpsam_jax.errors import UserError
from pgpsam_jax.results.grid import DONE, FAILED, PENDING, RUNNING, read_grid
from pgpsam_jax.utils.files import read_metrics
from tests.support import tiny_method, two_rows
from tests.support.faults import logged, newest
from tests.support.launcher import KNOWING, environment
from tests.support.small_run import write_data


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Known here, and by `launcher.KNOWING` to drivers and their cells."""
    with tiny_method.known():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def grid_file(data, tmp_path):
    """Writer of a grid file with two rows."""
    return functools.partial(two_rows.write, tmp_path, data)


def drive(grid_file: str, folder, *flags) -> subprocess.Popen:
    arguments = ["--grid", grid_file, "--workdir", str(folder), *flags]
    command = [sys.executable, "-m", "experiments.run_grid", *arguments]
    return subprocess.Popen(
        command,
        env=environment(1, KNOWING),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def drive_here(monkeypatch):
    """The driver in this process, where it has nothing to start; its exit code."""

    def drive(grid_file, folder, *flags):
        arguments = ["run_grid", "--grid", grid_file, "--workdir", str(folder), *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            run_grid.main()
        return ended.value.code

    return drive


def until(condition, process=None, seconds=300):
    """Wait for a condition that another process brings about."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended early: {process.stdout.read()}")
        pause.wait(0.01)


def gone(pid: int) -> bool:
    """Whether no process of this id runs any more (a zombie does not run)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_a_grid_from_death_to_done(grid_file, drive_here, tmp_path):
    """Killed driver: no orphan. Then all cells: a failure with its reason, the dead one resumed."""
    folder, spec = tmp_path / "g", grid_file(rate=1.0, steps=45)
    driver = drive(spec, folder, "--only", "whole*")
    cell = None

    def started():
        nonlocal cell
        if cell is None and (folder / "grid.json").is_file():
            cell = read_grid(folder).cells[0]
        return cell is not None and newest(cell.folder) and logged(cell.folder) > 2

    until(started, driver)
    pid = cell.state["pid"]
    os.kill(pid, signal.SIGSTOP)  # or it would be done soon
    assert cell.state["state"] == RUNNING and standing(cell) == RUNNING and not gone(pid)
    assert drive_here(spec, folder, "--only", "whole*") == 1  # left to the first
    assert cell.state["pid"] == pid
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    os.kill(pid, signal.SIGCONT)
    until(lambda: gone(pid) and standing(cell) == DIED)

    again = drive(spec, folder, "--workers", "2", "--max-failures", "3")
    output = again.communicate(timeout=900)[0]
    assert again.returncode == 1, output
    whole, odd = read_grid(folder).cells
    assert whole.state["state"] == DONE, (whole.folder / "log.txt").read_text()
    assert [r["step"] for r in read_metrics(whole.folder / "metrics.jsonl")] == [*range(1, 46)]
    assert "resumed from step" in (whole.folder / "log.txt").read_text()
    assert odd.state["state"] == FAILED and "final_learning_rate is 1" in odd.state["reason"]
    assert ", resumed" in output and "final_learning_rate is 1" in output
    runs = read_grid(folder).runs()
    assert len(runs["whole"]) == 1 and runs["odd"] == []
    timing = runs["whole"][0].timing
    assert {"data", "model", "compile", "train", "checkpoint", "evaluate"} <= set(timing)
    assert runs["whole"][0].provenance["code"] == read_grid(folder).code["code"]

    size = (whole.folder / "log.txt").stat().st_size
    assert drive_here(spec, folder, "--only", "whole*") == 0
    assert (whole.folder / "log.txt").stat().st_size == size  # a done cell is not touched


def test_a_cell_from_death_to_done(grid_file, drive_here, tmp_path):
    """Of a process that is gone, while another runs it, and when it is done."""
    spec, folder = grid_file(), tmp_path / "g"
    cell = write_plan(make_grid(spec, folder, {}), mix=False).cells[0]
    fields = {"pid": 1, "host": socket.gethostname(), "started": 0.0}
    write_state(cell.folder, RUNNING, **fields)
    with open(cell.folder / workdir_lock.LOCK, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert standing(cell) == RUNNING
        assert run(cell) == BUSY and cell.state["pid"] == 1
        assert drive_here(spec, folder, "--only", "whole*") == 1  # left to the first
    assert standing(cell) == DIED
    assert run(cell) == 0 and cell.state["state"] == DONE
    [done] = read_grid(folder).runs()["whole"]
    assert [r["step"] for r in read_metrics(cell.folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert {"data", "model", "compile", "train", "checkpoint", "evaluate"} <= set(done.timing)
    assert done.provenance["code"] == read_grid(folder).code["code"]
    before = (cell.folder / "metrics.jsonl").stat().st_mtime_ns
    assert drive_here(spec, folder, "--only", "whole*") == 0 and run(cell) == 0
    assert (cell.folder / "metrics.jsonl").stat().st_mtime_ns == before  # not touched


def test_a_cell_that_fails_says_why(grid_file, drive_here, tmp_path, monkeypatch, capfd):
    """A process of its own, as the driver starts it."""
    monkeypatch.setenv("PYTHONPATH", environment(1, KNOWING)["PYTHONPATH"])
    monkeypatch.setattr(scheduler, "_POLL_SECONDS", 0.05)
    folder = tmp_path / "g"
    assert drive_here(grid_file(rate=1.0), folder, "--only", "odd*", "--max-failures", "3") == 1
    odd = read_grid(folder).cells[1]
    assert odd.state["state"] == FAILED and "final_learning_rate is 1" in odd.state["reason"]
    assert read_grid(folder).runs() == {"whole": [], "odd": []}
    said = capfd.readouterr()
    assert "final_learning_rate is 1" in said.out + said.err


def test_a_cell_ends_with_its_driver():
    code = "import time; from experiments import run_cell; run_cell._end_with_parent()"
    command = [sys.executable, "-c", f"{code}; print('ready', flush=True); time.sleep(600)"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(1), **pipes) as process:
        assert process.stdout.readline() == b"ready\n" and process.poll() is None
        process.stdin.close()  # as the system does when the driver dies, however it dies
        assert process.wait(60) == 143


def test_a_stopped_driver_ends_what_it_started(grid_file, drive_here, tmp_path, monkeypatch):
    """A cell that is another program: the driver's part alone."""
    started = []

    def launch(self, cell, slot):
        cell.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        write_state(cell.folder, RUNNING, pid=started[-1].pid)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1]

    monkeypatch.setattr(scheduler.Scheduler, "_launch", launch)
    folder = tmp_path / "g"
    assert drive_here(grid_file(), folder, "--only", "whole*") == 128 + signal.SIGTERM
    assert [process.poll() for process in started] == [-signal.SIGTERM]
    assert read_grid(folder).cells[0].state["state"] == PENDING


def test_a_cell_that_failed_as_it_was_stopped_stays_failed(grid_file, tmp_path):
    grid = write_plan(make_grid(grid_file(), tmp_path / "g", {}), mix=False)
    drives = scheduler.Scheduler(grid, grid.cells, 1, None)
    for place, (cell, state) in enumerate(zip(grid.cells, (FAILED, RUNNING), strict=True)):
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_state(cell.folder, state, reason="a reason", pid=1)
        drives.running[place] = cell, subprocess.Popen([sys.executable, "-S", "-c", ""])
    drives._stop()
    assert [cell.state["state"] for cell in grid.cells] == [FAILED, PENDING]


@pytest.mark.slow
def test_a_stopped_driver_ends_its_cells(grid_file, tmp_path):
    folder = tmp_path / "g"
    driver = drive(grid_file(steps=100_000), folder, "--only", "whole*")
    until(lambda: list(folder.glob("whole*/state.json")), driver)
    cell = read_grid(folder).cells[0]
    pid = cell.state["pid"]
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(300) == 128 + signal.SIGTERM
    assert gone(pid) and cell.state["state"] == PENDING


def test_another_hosts_cell_is_left_alone_until_its_heart_stops(grid_file, tmp_path):
    grid = make_grid(grid_file(), tmp_path / "g", {})
    cell = grid.cells[0]
    fields = {"pid": 1, "host": "elsewhere", "started": 0.0}
    write_state(cell.folder, RUNNING, **fields)
    holder = cell.folder / workdir_lock.HOLDER
    holder.write_text(json.dumps(fields | {"doing": "running this cell", "since": "now"}))
    assert standing(cell) == RUNNING
    assert run(cell) == BUSY
    os.utime(holder, (time.time() - 1000,) * 2)
    assert standing(cell) == DIED


@pytest.mark.parametrize("locks", [True, False])
def test_a_heart_beats_while_a_cell_runs(locks, grid_file, tmp_path, monkeypatch):
    """Other hosts see it, and this one where there are no locks."""
    cell = write_plan(make_grid(grid_file(), tmp_path / "g", {}), mix=False).cells[0]
    holder = cell.folder / workdir_lock.HOLDER
    monkeypatch.setattr(run_cell, "HEARTBEAT_SECONDS", 0.01)

    def train(cell):
        os.utime(holder, (0, 0))
        until(lambda: holder.stat().st_mtime > time.time() - 100)
        assert standing(cell) == RUNNING
        with workdir_lock.hold(cell.folder, "training"):  # as the run itself does
            pass
        assert holder.is_file()
        return None, 0

    monkeypatch.setattr(run_cell, "_train", train)
    if not locks:
        no_locks = OSError(errno.ENOLCK, "no locks")
        monkeypatch.setattr(filelock.FileLock, "acquire", mock.Mock(side_effect=no_locks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(cell) == 0
    assert cell.state["state"] == DONE and not holder.exists()


def test_max_failures_stops_the_grid(grid_file, tmp_path, monkeypatch):
    grid = make_grid(grid_file(seeds=(0, 1, 2)), tmp_path / "g", {})
    write_plan(grid, mix=False)
    command = [sys.executable, "-c", "import sys; sys.exit(9)"]

    def launch(self, cell, slot):
        cell.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(command, stdin=subprocess.PIPE)

    monkeypatch.setattr(scheduler.Scheduler, "_launch", launch)
    monkeypatch.setattr(scheduler, "_POLL_SECONDS", 0.01)
    assert scheduler.Scheduler(grid, list(grid.cells), 1, 2).run() is False
    states = [cell.state for cell in grid.cells]
    assert [s["state"] for s in states] == [FAILED, FAILED] + [PENDING] * 4
    assert states[0]["reason"] == "ended with exit code 9"


def test_workers_share_what_there_is(monkeypatch):
    monkeypatch.setattr(device_assignment, "gpus", lambda: ["0", "1", "2", "3"])
    assert device_assignment.assign_devices(2) == [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, None),
    ]
    with pytest.raises(UserError, match="at most --workers 4"):
        device_assignment.assign_devices(5)
    monkeypatch.setattr(device_assignment, "gpus", lambda: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert device_assignment.assign_devices(2) == [({}, {0, 2, 4}), ({}, {1, 3})]
    with pytest.raises(UserError, match="one per core"):
        device_assignment.assign_devices(6)


def test_slurm_script_runs_what_is_not_done(grid_file, tmp_path):
    grid = make_grid(grid_file(seeds=(0, 1)), tmp_path / "a folder", {})
    write_state(grid.cells[0].folder, DONE, seconds=1.0)
    todo = [cell for cell in grid.cells if standing(cell) != DONE]
    text = script(grid, todo, workers=2)
    assert "#SBATCH --array=0-2%2" in text and "#SBATCH --requeue" in text
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    recorder.chmod(0o755)
    path = tmp_path / "job.sh"
    path.write_text(text.replace(sys.executable, str(recorder)))
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "2"}
    result = subprocess.run(
        ["bash", str(path)], env=environment, capture_output=True, text=True, check=True
    )
    folder = str(grid.path.absolute())
    wanted = ["-m", "pgpsam_jax.cli", "cell", "--workdir", folder, "--cell", todo[2].name]
    assert result.stdout.splitlines() == wanted
    with pytest.raises(UserError, match="nothing to submit"):
        script(grid, [], 1)


def test_dry_run_lists_and_writes_nothing(grid_file, drive_here, tmp_path, capsys):
    folder = tmp_path / "g"
    assert drive_here(grid_file(), folder, "--dry-run") == 0
    assert capsys.readouterr().out.count("pending") == 2
    assert not folder.exists()
    assert drive_here(grid_file(), folder, "--dry-run", "--only", "nothing*") == 2
    assert "matches no cell; there are whole-seed0, odd-seed0" in capsys.readouterr().err
