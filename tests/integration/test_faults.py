"""Disks that are full or read-only, writers that meet, a loss that is none: what is said."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from pgpsam_jax import errors
from pgpsam_jax.checkpointing import checkpoint, workdir_lock
from pgpsam_jax.config import serialization
from pgpsam_jax.data import dataset
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.errors import Interrupted, UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.inference import restore
from pgpsam_jax.runtime import preemption
from pgpsam_jax.training import metric_logger, train
from pgpsam_jax.utils.files import atomic_path, write_text
from tests.support import kept_steps, tiny_method
from tests.support.faults import again, copied, logged, newest, prepare, records, rubbish, saving
from tests.support.launcher import start
from tests.support.places import REPOSITORY
from tests.support.small_run import NAMES

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", autouse=True)
def one_step():
    with kept_steps.kept():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """(workdir, summary) of a run that nothing happened to; its cache is elsewhere."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, again(root, workdir)


@contextlib.contextmanager
def file_size(limit):
    """No file may grow beyond so many bytes: what a full disk does to large files alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, and a function that mounts it anew, read-only for example."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        command = ["mount", *options, str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may mount no file system")

    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs")
    yield place, mount
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(root, finished, small_disk, monkeypatch):
    """At several points of a run; the older checkpoint stays, and the same command goes on."""
    monkeypatch.setattr(
        metric_logger.MetricLogger, "_draw", lambda self: None
    )  # the largest file by far
    place, _ = small_disk
    workdir, ballast, seen = place / "run", place / "ballast", []
    for room in (0, 60, 100):  # KiB
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_bsize
        ballast.write_bytes(bytes(max(0, free - 1024 * room)))
        before = newest(workdir)
        with pytest.raises(UserError, match="No space left on device; free some space") as told:
            again(root, workdir)
        seen.append(str(told.value))
        ballast.unlink()
        assert newest(workdir) >= before
        assert not [path for path in workdir.rglob(".tmp-*")]
    assert newest(workdir) > 0 and any("no checkpoint can be written" in text for text in seen), (
        seen
    )
    assert again(root, workdir) == finished[1]
    assert records(workdir) == records(finished[0])
    assert not rubbish(workdir)


def test_a_file_that_may_not_grow(root, finished, tmp_path):
    """The same for users who may mount nothing: the limit is below a checkpoint's size."""
    workdir = tmp_path / "run"
    with file_size(5000), pytest.raises(UserError, match=r"File too large; free some space"):
        again(root, workdir)
    assert newest(workdir) == 0
    assert again(root, workdir) == finished[1]
    assert records(workdir) == records(finished[0])


def test_a_read_only_workdir(root, finished, small_disk):
    place, mount = small_disk
    copied(finished[0], place / "run")
    mount("-o", "remount,ro", "-t", "tmpfs")
    for workdir in (place / "new", place / "run"):
        with pytest.raises(UserError, match=r"Read-only file system; make it accessible"):
            again(root, workdir)
    with tiny_method.known():  # reading takes nothing away
        config = serialization.load_config(place / "run")
        assert restore.load_predictor(config, place / "run", NAMES) is not None


def test_a_workdir_that_is_a_file(root, tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"{tmp_path}/file.*; (a|make|choose) "):
            again(root, workdir)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    write_text(tmp_path / "a", "before")
    with file_size(10), pytest.raises(OSError) as told:
        write_text(tmp_path / "a", "x" * 100)
    assert str(errors.as_user_error(told.value)).startswith(f"{tmp_path / 'a'}: File too large; ")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_one_writer_at_a_time(root, finished, tmp_path):
    """The lock goes with a killed process; reading needs none and disturbs no save."""
    workdir = copied(finished[0], tmp_path / "run")
    programs = REPOSITORY / "tests" / "support" / "signal_programs.py"
    holder = start(programs, "hold", workdir)
    assert holder.stdout.readline() == "ready\n"
    under_way = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    under_way.mkdir()
    with tiny_method.known():
        config = serialization.load_config(workdir)
        said = rf"in use: process {holder.pid} on \S+ has been training there since \d+-"
        with pytest.raises(UserError, match=said):
            train.train(config, workdir)
        with pytest.raises(UserError, match=said):
            workdirs.evaluate_workdir(workdir)
        assert restore.load_predictor(config, workdir, NAMES) is not None
    assert under_way.is_dir()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert again(root, workdir) == finished[1]
    assert not rubbish(workdir)


def test_an_empty_workdir_is_not_left(tmp_path):
    with pytest.raises(ZeroDivisionError), workdir_lock.hold(tmp_path / "run", "training"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_an_interrupted_evaluation_leaves_the_last_one(root, finished, tmp_path, monkeypatch):
    workdir = copied(finished[0], tmp_path / "run")
    shutil.copytree(finished[0] / "evaluation", workdir / "evaluation")
    before = {p: p.read_bytes() for p in (workdir / "evaluation").rglob("*") if p.is_file()}
    monkeypatch.setattr(
        train.Predictor, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    with preemption.handle_signals(), pytest.raises(Interrupted, match="SIGTERM received"):
        again(root, workdir)
    assert {p: p.read_bytes() for p in (workdir / "evaluation").rglob("*") if p.is_file()} == before
    assert not rubbish(workdir)


def test_a_loss_that_is_no_number_stops_at_its_step(root, tmp_path, monkeypatch):
    """One bad slice: the step and the batch are named, and what is saved is from before."""
    settings = {"log__every_steps": 5, "log__checkpoint_steps": 1}
    order = make_loader(9, batch_size=8, seed=0)
    batches = [next(order).tolist() for _ in range(2)]
    [row, *_] = set(batches[1]) - set(batches[0])
    make, found = dataset.few_shot_data, []

    def with_a_bad_slice(*args, **kwargs):
        data = make(*args, **kwargs)
        data.images[row] = np.nan
        found.append(data.list.entries)
        return data

    monkeypatch.setattr(dataset, "few_shot_data", with_a_bad_slice)
    with pytest.raises(UserError, match=r"the loss is nan at step 2, whose batch is ") as told:
        again(root, tmp_path, **settings)
    wanted = {f"{case} {index}" for case, index in (found[0][r] for r in batches[1])}
    text = str(told.value).split("whose batch is ")[1].split(";")[0]
    named = {
        f"{case} {index}"
        for case, _, *indices in (part.split() for part in text.split(", "))
        for index in indices
    }
    assert named == wanted and f"{found[0][row][0]} {found[0][row][1]}" in named
    assert newest(tmp_path) == 1 and not saving(tmp_path)


def test_a_gradient_that_is_no_number_is_said(tmp_path):
    settings, rows = serialization.default_config().log, np.array([1, 0])
    slices = [("a", 4), ("b", 7)]
    with metric_logger.MetricLogger(tmp_path, settings, 0, np.ones(10), 2, slices) as log:
        with pytest.raises(
            UserError, match=r"the gradient norm is inf at step 3, whose batch is a"
        ):
            log.record(3, {"loss": np.float32(1), "gradient_norm": np.float32(np.inf)}, rows)
        log.record(3, {"loss": np.float32(1), "gradient_norm": np.float32(1)}, rows)


def test_a_stopped_run_goes_on(root, finished, tmp_path, monkeypatch):
    """Nothing that was done is lost, and the end is that of the run that nothing happened to."""
    record = metric_logger.MetricLogger.record

    def signaled(log, step, *args, **extra):
        record(log, step, *args, **extra)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, preemption.handle_signals():
        patch.setattr(metric_logger.MetricLogger, "record", signaled)
        with pytest.raises(Interrupted, match=r"SIGTERM received, step \d is saved"):
            again(root, tmp_path)
    assert 3 <= newest(tmp_path) == logged(tmp_path) < 6 and not rubbish(tmp_path)
    assert again(root, tmp_path) == finished[1]
    assert records(tmp_path) == records(finished[0])


def test_a_clock_that_is_set_back(root, finished, tmp_path, monkeypatch):
    """Begun in 2033, gone on with in 2001: order comes from steps, never from time.

    The log is ahead of the checkpoint, and its last line was cut: as a killed run leaves it.
    """
    workdir, now = copied(finished[0], tmp_path / "run", step=4), time.time
    shutil.copytree(workdir / "checkpoints" / "4", workdir / "checkpoints" / "2")
    with open(workdir / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')
    future = 2_000_000_000
    for path in (p for p in workdir.rglob("*") if "checkpoints/2" not in str(p)):
        os.utime(path, (future, future))
    monkeypatch.setattr(time, "time", lambda: now() - 8e8)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() - 8e8) * 1e9))
    assert again(root, workdir) == finished[1]
    assert records(workdir) == records(finished[0])
    assert checkpoint.saved_steps(workdir) == [4, 6]
