"""The report at the end of a command: written beside the run, and never its failure."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from pgpsam_jax import main
from pgpsam_jax.config import serialization
from pgpsam_jax.distributed import initialize
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.report import after_run
from pgpsam_jax.training import train
from tests.support.grid_folder import made_up, write_run
from tests.support.places import REPOSITORY


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", made_up("full", 0))


def report(folder) -> str:
    config = serialization.load_config(folder)
    return after_run.report_after_run(folder, config.data.root, config.model.base)


def test_a_report_is_written(run, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = run / "report" / "report.html"
    assert report(run) == f"report      {path}"
    assert "0.8" in path.read_text() or "80." in path.read_text()


def test_its_error_becomes_a_sentence(run, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text("something else")
    said = report(run)
    assert said.startswith(f"no report ({run / 'report' / 'report.html'} was not written by")
    assert said.endswith(f"; write it with pgpsam report {run}")
    assert "\n" not in said and "error:" not in said


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (SimpleNamespace(returncode=-9, stdout="", stderr=""), "it was killed"),
        (SimpleNamespace(returncode=1, stdout="", stderr="Trace\nKeyError: 'x'\n"), "KeyError"),
        (subprocess.TimeoutExpired("report", 1800), "timed out after 1800 seconds"),
        (OSError("no memory"), "no memory"),
    ],
)
def test_whatever_happens_the_run_ends_well(run, monkeypatch, outcome, reason):
    def started(command, **options):
        assert command[:3] == [sys.executable, "-m", "pgpsam_jax.report"]
        assert options["env"]["JAX_PLATFORMS"] == "cpu"
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(after_run.subprocess, "run", started)
    assert reason in report(run)


def test_moved_data_and_weights_are_passed_on(run, monkeypatch):
    seen = []
    done = SimpleNamespace(returncode=0, stdout="there\n", stderr="")
    monkeypatch.setattr(after_run.subprocess, "run", lambda c, **_: seen.append(c) or done)
    assert after_run.report_after_run(run, "elsewhere", "weights/sam") == "report      there"
    assert seen[0][4:] == ["--data", "elsewhere", "--base", "weights/sam"]


@pytest.mark.parametrize(
    ("words", "process", "written"),
    [
        ([], None, True),
        (["--mode", "evaluate"], None, True),
        (["--config.log.report=False"], None, False),
        (["--mode", "evaluate", "--config.log.report=False"], None, False),
        ([], 0, True),
        ([], 1, False),
    ],
)
def test_which_commands_write_one(run, monkeypatch, words, process, written):
    """The first process, after training and after evaluating, unless it is switched off."""
    seen = []
    monkeypatch.setattr(train, "train", lambda *_: seen.append("trained"))
    monkeypatch.setattr(workdirs, "evaluate_workdir", lambda *_: seen.append("evaluated"))
    monkeypatch.setattr(initialize, "joined", lambda *_: warnings.catch_warnings())
    monkeypatch.setattr(after_run, "report_after_run", lambda *_: seen.append("reported"))
    info = None if process is None else SimpleNamespace(process=process)
    monkeypatch.setattr(main, "_process_info", lambda flags: info)
    with warnings.catch_warnings():
        main.main(["--workdir", str(run), *words])
    done = "evaluated" if "evaluate" in words else "trained"
    assert seen == [done, *["reported"] * written]
