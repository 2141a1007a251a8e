"""Grids: plans and their folders, the driver with real cells, death and resumption, SLURM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_method
from faults import NOISE, TINY, logged, newest
from launcher import KNOWING, environment
from places import REPOSITORY
from small_run import write_data

from experiments import driver, placement, run_grid
from experiments.plan import _images, load_plan, make_grid, parse_settings, settle
from experiments.run_cell import BUSY, DIED, standing, write_state
from experiments.slurm import script
from pgpsam_jax import config as configuration
from pgpsam_jax import identity
from pgpsam_jax.data import dataset
from pgpsam_jax.errors import UserError
from pgpsam_jax.files import write_json
from pgpsam_jax.runs import DONE, FAILED, PENDING, RUNNING, read_grid, read_metrics

GRIDS = sorted(
    path.stem
    for path in (REPOSITORY / "experiments" / "grids").glob("*.py")
    if path.stem not in ("__init__", "targets")
)

SETTINGS = TINY | NOISE | {"log__checkpoint_steps": 15}
CONFIG = """
from pathlib import Path

from small_run import config_for

def get_config():
    return config_for(Path({root!r}), **{settings!r})
"""
GRID = """
from experiments.plan import Plan, Row

def get_grid(variant="two"):
    rows = [Row("whole", "whole", {{}}), Row("odd", "odd", {{"optim.final_learning_rate": {rate}}})]
    return Plan("Two rows", {config!r}, tuple(rows), {{"train.steps": {steps}}}, seeds={seeds})
"""


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
    """Writer of a grid file with two rows; `rate` is the second row's last learning rate."""

    def write(rate=1e-5, steps=4, seeds=(0,)):
        config = tmp_path / "small.py"
        config.write_text(CONFIG.format(root=str(data), settings=SETTINGS))
        path = tmp_path / "two_rows.py"
        path.write_text(GRID.format(config=str(config), rate=rate, steps=steps, seeds=seeds))
        return str(path)

    return write


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("variant", ["", "phantom"])
def test_shipped_grids_resolve(name, variant, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = f"experiments/grids/{name}.py"
    grid = make_grid(f"{path}:{variant}" if variant else path, tmp_path, {})
    assert len(grid.cells) == 3 * len(grid.rows)
    prints = {identity.fingerprint(configuration.from_json(c.config)) for c in grid.cells}
    assert len(prints) == len(grid.cells)  # no two cells compute the same
    assert (grid.published is not None) == (name.startswith("table") and not variant)
    assert grid.reference in [row.name for row in grid.rows]
    for cell in grid.cells:
        assert cell.config["seed"] == cell.config["fewshot"]["seed"] == cell.seed
        assert (cell.config["data"]["layout"] == "phantom") == (variant == "phantom")
    assert grid.title.splitlines() == [grid.title]


def test_table3_is_the_papers_four_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    grid = make_grid("experiments/grids/table3.py", tmp_path, {})
    switches = [tuple(c.config["model"][m] for m in ("cfm", "ppg", "ppr")) for c in grid.cells[:4]]
    assert switches == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]


def test_identity_is_what_decides_a_result(data, grid_file, tmp_path):
    plain = make_grid(grid_file(), tmp_path / "g", {})
    moved = make_grid(grid_file(), tmp_path / "g", {"data.cache_dir": "x", "log.every_steps": 7})
    other = make_grid(grid_file(), tmp_path / "g", {"optim.learning_rate": 1e-4})
    folders = [[cell.folder.name for cell in grid.cells] for grid in (plain, moved, other)]
    assert folders[0] == folders[1]
    assert not set(folders[0]) & set(folders[2])
    assert all(name.startswith(("whole-seed0-", "odd-seed0-")) for name in folders[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.speed=3"], "no such configuration field: optim.speed"),
        (["nowhere.at.all=3"], "no such configuration field"),
        (["train.steps=fast"], "train.steps cannot be 'fast'"),
        (["steps"], "is not FIELD=VALUE"),
    ],
)
def test_wrong_settings(settings, message, grid_file, tmp_path):
    with pytest.raises(UserError, match=message):
        make_grid(grid_file(), tmp_path, parse_settings(settings))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not found"),
        ("def get_plan(): pass", "defines no get_grid"),
        ("import nothing_of_this_name", "cannot be run"),
        ("def get_grid(): (", "cannot be run"),
        ("def get_grid(v=''):\n    raise ValueError('unknown variant')", "unknown variant"),
    ],
)
def test_wrong_grid_files(text, message, tmp_path):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_plan(str(path))


def test_a_changed_plan_is_not_mixed_in(grid_file, tmp_path):
    folder = tmp_path / "g"
    first = make_grid(grid_file(), folder, {})
    settle(first, mix=False)
    write_state(first.cells[0].folder, DONE, seconds=1.0)
    settle(make_grid(grid_file(seeds=(0, 1)), folder, {}), mix=False)  # more cells may join
    assert len(read_grid(folder).cells) == 4
    with pytest.raises(UserError, match="whole-seed1 is planned no longer"):
        settle(first, mix=False)
    changed = make_grid(grid_file(steps=5, seeds=(0, 1)), folder, {})
    with pytest.raises(UserError, match=r"other settings \(train.steps: 4 there, 5 now\)"):
        settle(changed, mix=False)
    assert read_grid(folder).cells[0].state["state"] == DONE
    settle(changed, mix=True)
    assert read_grid(folder).cells[0].state["state"] == PENDING  # in a folder of its own


def test_a_file_of_the_same_content_is_the_same_plan(data, grid_file, tmp_path):
    folder, copy = tmp_path / "g", tmp_path / "copy"
    shutil.copytree(data, copy)
    table = copy / "table.json"

    def plan():
        places = {"data.root": str(copy), "data.label_table": str(table)}
        return make_grid(grid_file(), folder, places)

    first = settle(make_grid(grid_file(), folder, {}), mix=False)
    assert settle(plan(), mix=False).cells[0].folder == first.cells[0].folder
    text = table.read_text()
    table.unlink()  # what cannot be read is no other content
    assert settle(plan(), mix=False).cells[0].folder == first.cells[0].folder
    table.write_text(text)
    settle(plan(), mix=False)
    table.write_text(text.replace("liver", "lever"))
    with pytest.raises(UserError, match=r"data.label_table: its file holds something else now"):
        settle(plan(), mix=False)
    assert settle(plan(), mix=True).cells[0].folder != first.cells[0].folder


def test_a_done_cell_is_held_to_its_data(data, grid_file, tmp_path):
    folder, copy = tmp_path / "g", tmp_path / "copy"
    shutil.copytree(data, copy)
    first = settle(make_grid(grid_file(), folder, {}), mix=False)
    done = first.cells[0]
    write_state(done.folder, DONE, seconds=1.0)
    test = dataset.find_split(configuration.from_json(done.config)).test
    write_json(done.folder / "provenance.json", {"test": dataset.images_digest(test)})
    elsewhere = make_grid(grid_file(), folder, {"data.root": str(copy)})
    assert settle(elsewhere, mix=False).cells[0].folder == done.folder
    settle(first, mix=False)
    name = test[0].image.name
    (copy / "images" / name).write_bytes((copy / "images" / name).read_bytes() + b"x")
    _images.cache_clear()
    with pytest.raises(UserError, match=r"copy' holds other test images than"):
        settle(elsewhere, mix=False)
    assert settle(elsewhere, mix=True).cells[0].state["state"] == PENDING


def test_changed_code_is_not_mixed_in(grid_file, tmp_path):
    grid = make_grid(grid_file(), tmp_path / "g", {})
    settle(grid, mix=False)
    plan = grid.path / "grid.json"
    content = json.loads(plan.read_text())
    content["code"] = {"git": "0123456789abcdef", "code": "another"}
    plan.write_text(json.dumps(content))
    settle(grid, mix=False)  # nothing was run yet
    plan.write_text(json.dumps(content))
    write_state(grid.cells[0].folder, DONE, seconds=1.0)
    with pytest.raises(UserError, match="code of pgpsam_jax changed \\(0123456789ab there"):
        settle(grid, mix=False)
    settle(grid, mix=True)


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
    assert "taken up again" in output and "final_learning_rate is 1" in output
    runs = read_grid(folder).runs()
    assert len(runs["whole"]) == 1 and runs["odd"] == []
    timing = runs["whole"][0].timing
    assert {"data", "model", "compile", "train", "checkpoint", "evaluate"} <= set(timing)
    assert runs["whole"][0].provenance["code"] == read_grid(folder).code["code"]

    size = (whole.folder / "log.txt").stat().st_size
    assert drive_here(spec, folder, "--only", "whole*") == 0
    assert (whole.folder / "log.txt").stat().st_size == size  # a done cell is not touched


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

    monkeypatch.setattr(driver.Driver, "_launch", launch)
    folder = tmp_path / "g"
    assert drive_here(grid_file(), folder, "--only", "whole*") == 128 + signal.SIGTERM
    assert [process.poll() for process in started] == [-signal.SIGTERM]
    assert read_grid(folder).cells[0].state["state"] == PENDING


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
    write_state(cell.folder, RUNNING, **fields, heartbeat=time.time())
    assert standing(cell) == RUNNING
    from experiments.run_cell import run

    assert run(cell) == BUSY
    write_state(cell.folder, RUNNING, **fields, heartbeat=time.time() - 1000)
    assert standing(cell) == DIED


def test_max_failures_stops_the_grid(grid_file, tmp_path, monkeypatch):
    grid = make_grid(grid_file(seeds=(0, 1, 2)), tmp_path / "g", {})
    settle(grid, mix=False)
    command = [sys.executable, "-c", "import sys; sys.exit(9)"]

    def launch(self, cell, slot):
        cell.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(command, stdin=subprocess.PIPE)

    monkeypatch.setattr(driver.Driver, "_launch", launch)
    monkeypatch.setattr(driver, "_POLL_SECONDS", 0.01)
    assert driver.Driver(grid, list(grid.cells), 1, 2).run() is False
    states = [cell.state for cell in grid.cells]
    assert [s["state"] for s in states] == [FAILED, FAILED] + [PENDING] * 4
    assert states[0]["reason"] == "ended with exit code 9"


def test_workers_share_what_there_is(monkeypatch):
    monkeypatch.setattr(placement, "gpus", lambda: ["0", "1", "2", "3"])
    assert placement.places(2) == [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, None),
    ]
    with pytest.raises(UserError, match="at most --workers 4"):
        placement.places(5)
    monkeypatch.setattr(placement, "gpus", lambda: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert placement.places(2) == [({}, {0, 2, 4}), ({}, {1, 3})]
    with pytest.raises(UserError, match="one per core"):
        placement.places(6)


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
    wanted = ["-m", "experiments.run_cell", "--workdir", folder, "--cell", todo[2].name]
    assert result.stdout.splitlines() == wanted
    with pytest.raises(UserError, match="nothing to submit"):
        script(grid, [], 1)


def test_dry_run_lists_and_writes_nothing(grid_file, drive_here, tmp_path, capsys):
    folder = tmp_path / "g"
    assert drive_here(grid_file(), folder, "--dry-run") == 0
    assert capsys.readouterr().out.count("pending") == 2
    assert not folder.exists()
    assert drive_here(grid_file(), folder, "--dry-run", "--only", "nothing*") == 2
    assert "fits no cell; there are whole-seed0, odd-seed0" in capsys.readouterr().err
