"""Disks that are full or read-only, files that are damaged, a loss that is none: what is said."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import tiny_method
from faults import NOISE, TINY, newest, prepare, records, rubbish, run, saving
from launcher import start
from places import REPOSITORY
from safetensors.numpy import save_file
from small_run import config_for

from pgpsam_jax import (
    checkpoint,
    cnn_base,
    errors,
    interruption,
    lock,
    resumption,
    runlog,
    train,
)
from pgpsam_jax.data import dataset
from pgpsam_jax.data.labels import load_label_table
from pgpsam_jax.data.loader import make_loader
from pgpsam_jax.errors import Interrupted, UserError
from pgpsam_jax.files import atomic_path, file_digest, write_text

pytestmark = pytest.mark.faults
KINDS = ("missing", "empty", "half", "garbage", "flipped")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """(workdir, summary) of a run that nothing happened to; its cache is elsewhere."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, again(root, workdir)


def again(root, workdir, **settings):
    return run(root, workdir, data__cache_dir=str(root / "cache"), **NOISE | settings)


def copied(workdir, into, step=6):
    """A run as it stood after a step that was saved."""
    shutil.copytree(workdir, into, ignore=shutil.ignore_patterns("evaluation", ".lock"))
    for number in checkpoint.numbers(into):
        if number > step:
            shutil.rmtree(into / "checkpoints" / str(number))
    return into


def damage(path, kind, draw):
    """Do to a file what disks, copies and users do; whether that changed anything."""
    before = path.read_bytes()
    at = draw.randrange(max(1, len(before)))
    flipped = bytes([before[at] ^ 1 << draw.randrange(8)]) if before else b""
    after = {
        "missing": None,
        "empty": b"",
        "half": before[: len(before) // 2],
        "garbage": draw.randbytes(len(before)),
        "flipped": before[:at] + flipped + before[at + 1 :],
    }[kind]
    path.unlink()
    if after is not None:
        path.write_bytes(after)
    return after != before


@pytest.fixture(scope="module")
def abstract(root, finished):
    """(shapes of the state with shardings, loader) to restore a checkpoint with."""
    config = config_for(root, **TINY | NOISE)
    with tiny_method.known():
        graphdef, params, frozen, _ = train.build.init_model(config, 3)
        mesh = train.make_run_mesh(config)
        batch = {"image": np.zeros((8, 32, 32)), "label": np.zeros((8, 32, 32), np.int32)}
        lanes = train.sharding.batch_sharding(mesh)
        batch = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=lanes) for k, v in batch.items()
        }
        step = train.shard_step(config, mesh, graphdef, params, frozen, batch, epoch_size=7, seed=0)
    return step.state, make_loader(7, batch_size=8, seed=0)


def restored(workdir, abstract):
    """The newest state as numbers."""
    with checkpoint.Checkpoints(workdir) as checkpoints:  # a UserError closes it too
        state = checkpoints.restore(*abstract)
    return jax.device_get(jax.tree.leaves(state))


def some_of(kinds, at):
    """Two of the kinds for a file, others for the next one: all have their turn in three files."""
    return [kinds[(2 * at + more) % len(kinds)] for more in range(2)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    finished, abstract, sealed, every, tmp_path
):
    """Every file of it. Without its hashes (killed before they were written), a flipped bit of an
    array is not noticed."""
    draw = random.Random(0)
    whole, before = (restored(copied(finished[0], tmp_path / str(n), n), abstract) for n in (6, 4))
    workdir, folder = tmp_path / "6", tmp_path / "6" / "checkpoints" / "6"
    if not sealed:
        (folder / "sha256.json").unlink()
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    spare, told = tmp_path / "spare", 0
    shutil.copytree(folder, spare)
    kinds = KINDS if sealed else KINDS[:-1]
    for at, name in enumerate(names):
        for kind in kinds if every else some_of(kinds, at)[: 2 if sealed else 1]:
            if not damage(folder / name, kind, draw):
                continue
            try:
                state = restored(workdir, abstract)
            except UserError as error:
                told += 1
                assert f"checkpoint {folder} cannot be read (" in str(error)
                assert str(error).endswith("; delete that folder to go on from 4")
                assert len(str(error).splitlines()) == 1
            else:
                assert all(np.array_equal(a, b) for a, b in zip(state, whole, strict=True)), name
                top = (str(name) == "sha256.json" and kind == "missing") or "/" not in str(name)
                assert top or not sealed, (name, kind)
            shutil.rmtree(folder)
            shutil.copytree(spare, folder)
    assert told > (60 if sealed else 20) / (1 if every else 2.5 if sealed else 4)
    shutil.rmtree(folder)  # as it was told
    state = restored(workdir, abstract)
    assert all(np.array_equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damaged_parameters_of_the_best_step_are_not_passed_over(every, tmp_path):
    """They are not the newest: where they cannot be read, nothing takes their place unsaid."""
    params, draw, told = {"w": jax.numpy.arange(1000.0)}, random.Random(0), 0
    with checkpoint.Best(tmp_path) as best:
        best.save(params, 3, 0.5)
    abstract = {"w": jax.ShapeDtypeStruct((1000,), np.float32, sharding=params["w"].sharding)}
    folder, spare = tmp_path / "best" / "0", tmp_path / "spare"
    shutil.copytree(folder, spare)
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    for at, name in enumerate(names):
        for kind in KINDS if every else some_of(KINDS, at):
            if damage(folder / name, kind, draw):
                try:
                    record = checkpoint.best_record(tmp_path)
                    found = checkpoint.restore_params(tmp_path, abstract, best=True)
                    assert record["step"] == 3 and np.array_equal(found["w"], params["w"])
                except UserError as error:
                    told += 1
                    assert str(tmp_path / "best") in str(error) and "delete" in str(error)
                shutil.rmtree(folder)
                shutil.copytree(spare, folder)
    assert told > (30 if every else 12)


FILES = ("config.json", "labels.json", "fewshot.txt", "base.json", "frozen.safetensors")
FILES += ("provenance.json", "metrics.jsonl", "timing.json", "cost.json")
HARMLESS = ("metrics.jsonl", "timing.json", "cost.json")  # they record, and decide nothing
MADE_AGAIN = ("labels.json", "provenance.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_workdir_is_said(root, finished, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "run_evaluation", lambda *_: "evaluated")
    for kind in ("missing", "garbage") if name in HARMLESS else KINDS[:-1]:
        workdir = copied(finished[0], tmp_path / kind)
        damage(workdir / name, kind, random.Random(kind))
        harmless = name in HARMLESS or (name in MADE_AGAIN and kind == "missing")
        if harmless:
            assert again(root, workdir) == "evaluated"
            if name == "metrics.jsonl":
                assert "metrics.jsonl is damaged" in capsys.readouterr().out
        else:
            with pytest.raises(UserError) as told:
                again(root, workdir)
            assert name in str(told.value) and len(str(told.value).splitlines()) == 1
            assert newest(workdir) == 6


def test_no_fresh_start_in_place_of_a_run(root, finished, tmp_path):
    workdir = copied(finished[0], tmp_path / "run")
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds checkpoints but no config.json; restore it"):
        again(root, workdir)


def test_other_data_is_another_run(root, finished, tmp_path):
    workdir, other = copied(finished[0], tmp_path / "run"), tmp_path / "other"
    shutil.copytree(root, other, ignore=shutil.ignore_patterns("cache"))
    shutil.copy(other / "images" / "a.nii.gz", other / "images" / "b.nii.gz")
    with pytest.raises(UserError, match=r"the training data has changed since the run in .* began"):
        again(root, workdir, data__root=str(other), data__verify=False)
    table = json.loads((root / "table.json").read_text())
    table["classes"][0]["name"] = "kidney"
    (other / "table.json").write_text(json.dumps(table))
    split = dataset.Split([], [], [], load_label_table(other / "table.json"))
    with pytest.raises(UserError, match=r"labels.json has other classes"):
        resumption.compare(workdir, split)


def test_another_file_of_the_cnn_is_another_run(root, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_evaluation", lambda *_: "evaluated")
    config = config_for(
        root, **TINY, **NOISE, model__cnn_base=str(tmp_path / "cnn"), train__steps=2
    )

    def begin(value):
        tensors = {"kernel": np.full((16, 3), value), "bias": np.zeros(3)}
        tensors = {name: np.float32(array) for name, array in tensors.items()}
        save_file(tensors, tmp_path / "cnn.safetensors", {"format": cnn_base.FORMAT})
        with tiny_method.known(cnn="first"):
            return train.train(config, tmp_path / "run")

    assert begin(0.1) == "evaluated"
    origin = tmp_path / "run" / "provenance.json"
    assert json.loads(origin.read_text())["cnn_base"] == file_digest(tmp_path / "cnn.safetensors")
    said = r"the file of model\.cnn_base has changed since the run in .* began"
    with pytest.raises(UserError, match=said):
        begin(0.2)
    assert begin(0.1) == "evaluated"


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
    monkeypatch.setattr(runlog.RunLog, "_draw", lambda self: None)  # the largest file by far
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
        config = train.configuration.load_config(place / "run")
        assert train.load_predictor(config, place / "run", 3) is not None


def test_a_workdir_that_is_a_file(root, tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"{tmp_path}/file.*; (a|make|choose) "):
            again(root, workdir)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    write_text(tmp_path / "a", "before")
    with file_size(10), pytest.raises(OSError) as told:
        write_text(tmp_path / "a", "x" * 100)
    assert str(errors.explained(told.value)).startswith(f"{tmp_path / 'a'}: File too large; ")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_one_writer_at_a_time(root, finished, tmp_path):
    """The lock goes with a killed process; reading needs none and disturbs no save."""
    workdir = copied(finished[0], tmp_path / "run")
    heed = REPOSITORY / "tests" / "heed.py"
    holder = start(heed, "hold", workdir)
    assert holder.stdout.readline() == "ready\n"
    under_way = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    under_way.mkdir()
    with tiny_method.known():
        config = train.configuration.load_config(workdir)
        said = rf"in use: process {holder.pid} on \S+ has been training there since \d+-"
        with pytest.raises(UserError, match=said):
            train.train(config, workdir)
        with pytest.raises(UserError, match=said):
            train.evaluate_workdir(workdir)
        assert train.load_predictor(config, workdir, 3) is not None
    assert under_way.is_dir()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert again(root, workdir) == finished[1]
    assert not rubbish(workdir)


def test_an_empty_workdir_is_not_left(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path / "run", "training"):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_an_interrupted_evaluation_leaves_the_last_one(root, finished, tmp_path, monkeypatch):
    workdir = copied(finished[0], tmp_path / "run")
    shutil.copytree(finished[0] / "evaluation", workdir / "evaluation")
    before = {p: p.read_bytes() for p in (workdir / "evaluation").rglob("*") if p.is_file()}
    monkeypatch.setattr(
        train.Predictor, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    with interruption.listening(), pytest.raises(Interrupted, match="SIGTERM came"):
        again(root, workdir)
    assert {p: p.read_bytes() for p in (workdir / "evaluation").rglob("*") if p.is_file()} == before
    assert not rubbish(workdir)


def test_a_loss_that_is_no_number_stops_at_its_step(root, tmp_path, monkeypatch):
    """One bad slice: the step and the batch are named, and what is saved is from before."""
    settings = {"fewshot__count": 9, "log__every_steps": 5, "log__checkpoint_steps": 1}
    order = make_loader(9, batch_size=8, seed=0)
    batches = [next(order).tolist() for _ in range(2)]
    [row, *_] = set(batches[1]) - set(batches[0])
    make, found = train.dataset.few_shot_data, []

    def with_a_bad_slice(*args, **kwargs):
        data = make(*args, **kwargs)
        data.images[row] = np.nan
        found.append(data.list.entries)
        return data

    monkeypatch.setattr(train.dataset, "few_shot_data", with_a_bad_slice)
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
    settings, rows = train.configuration.default_config().log, np.array([1, 0])
    slices = [("a", 4), ("b", 7)]
    with runlog.RunLog(tmp_path, settings, 0, np.ones(10), 2, slices) as log:
        with pytest.raises(
            UserError, match=r"the gradient norm is inf at step 3, whose batch is a"
        ):
            log.record(3, {"loss": np.float32(1), "gradient_norm": np.float32(np.inf)}, rows)
        log.record(3, {"loss": np.float32(1), "gradient_norm": np.float32(1)}, rows)


def test_a_clock_that_is_set_back(root, finished, tmp_path, monkeypatch):
    """Begun in 2033, gone on with in 2001: order comes from steps, never from time."""
    workdir, now = copied(finished[0], tmp_path / "run", step=4), time.time
    shutil.copytree(workdir / "checkpoints" / "4", workdir / "checkpoints" / "2")
    future = 2_000_000_000
    for path in (p for p in workdir.rglob("*") if "checkpoints/2" not in str(p)):
        os.utime(path, (future, future))
    monkeypatch.setattr(time, "time", lambda: now() - 8e8)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() - 8e8) * 1e9))
    assert again(root, workdir) == finished[1]
    assert records(workdir) == records(finished[0])
    assert checkpoint.numbers(workdir) == [4, 6]
