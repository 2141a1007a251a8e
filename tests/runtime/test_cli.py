"""What all commands share: how they begin, are interrupted, are not heard, and end."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import filelock
import jax
import pytest

from pgpsam_jax.checkpointing import workdir_lock
from pgpsam_jax.config import defaults, serialization
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime import compilation_cache, worker_pool
from pgpsam_jax.runtime.cli import Parser, pair, positive
from pgpsam_jax.utils.files import atomic_folder, atomic_path, local, refuse_foreign
from tests.support.faults import await_that
from tests.support.launcher import environment, start
from tests.support.places import REPOSITORY
from tests.support.worker_jobs import write_for_long

PROGRAMS = REPOSITORY / "tests" / "support" / "signal_programs.py"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("scenario", ["command", "masked", "deaf"])
def test_a_signal_ends_a_command_in_one_line(scenario, number, tmp_path):
    process = start(PROGRAMS, scenario, tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.splitlines() == [
        f"stopped: {signal.Signals(number).name} received; every file that was written is complete"
    ]
    assert not list(tmp_path.iterdir())  # what it was writing is removed


def test_an_interrupt_while_modules_load():
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
sys.argv[0] = "-m"
import pgpsam_jax
print("ready", flush=True)
time.sleep(60)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "stopped: SIGINT came\n")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    process = start(PROGRAMS, "talk", tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == ""


def test_output_that_cannot_be_written(tmp_path):
    """A full disk behind `> file` is a sentence, not a traceback at the end."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, PROGRAMS, "say", tmp_path],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(1),
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_workers_that_are_ended_remove_what_they_write(tmp_path):
    def jobs():
        yield tmp_path / "mask"
        assert await_that(lambda: list(tmp_path.glob(".tmp-*")))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(worker_pool.map_in_order(write_for_long, jobs(), 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("make", "by"), [(atomic_path, "open"), (atomic_folder, "mkdir")])
def test_a_signal_just_after_the_file_is_there_leaves_none(make, by, tmp_path, monkeypatch):
    function = getattr(os, by)

    def interrupted(*arguments, **options):
        function(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, by, interrupted)
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "x"):
        pass
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


ADDRESSES = ["gs://b/x", "gs:/b/x", "S3://b", "http://h/x", "https://h/x", "file:///data", "hf://x"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = Parser("x", "")
    parser.add_argument("--work-dir")
    parser.add_argument("runs", nargs="*")
    for arguments in (["--work-dir", address], ["ok", address]):
        with pytest.raises(UserError, match="is an address, and only local paths"):
            parser.parse_args(arguments)
    for field in ("data.root", "data.cache_dir", "model.base", "fewshot.file"):
        config = defaults.default_config()
        section, name = field.split(".")
        config[section][name] = address
        with pytest.raises(UserError, match=f"^{field} {address} is an address"):
            serialization.validate(config)
    for path in (address, Path(address)):
        with pytest.raises(UserError, match="is an address"), workdir_lock.hold(path, "training"):
            pass
        with pytest.raises(UserError, match="is an address"):
            serialization.load_config(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["runs/x", "/data/a:b", "C:/data", "./gs:/x", "a b", ""])
def test_paths_are_no_addresses(path):
    assert local(path, "x") == Path(path)


@pytest.mark.parametrize(
    "error, said",
    [
        (
            RuntimeError("Unable to initialize backend 'x': none. (set JAX_PLATFORMS='')"),
            "'x': none",
        ),
        (AssertionError(), "no such device"),
    ],
)
def test_a_platform_that_is_not_there(error, said, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "x")
    with pytest.raises(UserError, match=said) as caught:
        compilation_cache.start()
    assert "cannot start the platform 'x'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def unlocked(monkeypatch, number):
    def acquire(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)


@pytest.mark.parametrize("number", sorted(workdir_lock.NO_LOCKS))
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    unlocked(monkeypatch, number)
    with (
        pytest.warns(UserWarning, match="has no locks"),
        workdir_lock.hold(tmp_path / "run", "training"),
    ):
        assert (tmp_path / "run" / workdir_lock.HOLDER).is_file()
    assert not (tmp_path / "run" / workdir_lock.HOLDER).exists()


def test_without_locks_a_process_of_this_host_is_still_seen(tmp_path, monkeypatch):
    process = start(PROGRAMS, "hold", tmp_path)
    assert process.stdout.readline() == "ready\n"
    unlocked(monkeypatch, errno.ENOLCK)
    with pytest.raises(UserError, match="is in use"), workdir_lock.hold(tmp_path, "training"):
        pass
    process.kill()
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with workdir_lock.hold(tmp_path, "training"):  # what it left says nothing
            pass


def test_other_errors_of_a_lock_are_told(tmp_path, monkeypatch):
    unlocked(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match="disk"), workdir_lock.hold(tmp_path, "training"):
        pass


def test_a_folder_of_other_things_is_no_workdir(tmp_path):
    for name in ("slurm-1.out", "notes.txt", "cache"):
        (tmp_path / name).mkdir() if name == "cache" else (tmp_path / name).write_text("")
    with workdir_lock.hold(tmp_path, "training"):  # nothing would be lost
        pass
    for place, content in (("photos", None), ("labels.json", "{}"), ("evaluation", None)):
        folder = tmp_path / place / "home"
        folder.mkdir(parents=True)
        (folder / place).mkdir() if content is None else (folder / place).write_text(content)
        (folder / ".tmp-mine").write_text("")
        with pytest.raises(UserError, match=f"holds {place} but is no run"):
            with workdir_lock.hold(folder, "training"):
                pass
        assert {p.name for p in folder.iterdir()} == {place, ".tmp-mine"}
        with pytest.raises(UserError, match="but is no grid"):
            refuse_foreign(folder, ("grid.json",), "grid")


def test_help_shows_defaults_and_examples_as_they_are(capsys):
    parser = Parser("x", "What it does.\n\nExamples:\n  python -m x \\\n      --number 3\n")
    parser.add_argument("--number", type=positive, default=2.0, help="a number")
    parser.add_argument("--switch", action="store_true", help="a switch")
    parser.add_argument("--window", type=pair, help="two numbers")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "a number (default: 2.0)" in said and "a switch\n" in said
    assert said.endswith("Examples:\n  python -m x \\\n      --number 3\n")
    assert parser.parse_args(["--window", "-125,275"]).window == (-125, 275)
    for wrong in (["--number", "0"], ["--number", "x"], ["--window", "2,1"], ["--nothing"]):
        with pytest.raises(UserError, match="--help lists the flags"):
            parser.parse_args(wrong)


MODULES = ("predict", "verify", "report.__main__", "checkpointing.workdir_lock")


@pytest.mark.parametrize(
    "module", [*(f"pgpsam_jax.{name}" for name in MODULES), "experiments.run_grid"]
)
def test_help_needs_no_jax(module):
    code = f"import sys; import {module}"
    code += "; assert not {'jax', 'optax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
