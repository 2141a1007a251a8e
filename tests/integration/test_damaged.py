"""Files that are damaged, data and bases that are others: what is said."""

import json
import random
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pgpsam_jax.checkpointing import best_parameters, checkpoint, resumption
from pgpsam_jax.data import dataset
from pgpsam_jax.data.batch_sampler import make_loader
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.methods import build
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import plan, train
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.utils.files import file_digest
from tests.support import kept_steps, tiny_method
from tests.support.faults import NOISE, TINY, again, copied, newest, prepare
from tests.support.small_run import config_for

pytestmark = pytest.mark.faults
KINDS = ("missing", "empty", "half", "garbage", "flipped")


@pytest.fixture(scope="module", autouse=True)
def one_step():
    with kept_steps.kept():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The workdir of a run that nothing happened to, not evaluated; its cache is elsewhere."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workdirs, "run_evaluation", lambda *_: {})
        again(root, workdir)
    return workdir


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
        graphdef, params, frozen, _ = build.init_model(config.model, 3, config.seed)
        mesh = plan.mesh_of(config.mesh, config.model, config.train.batch_size)
        batch = {"image": np.zeros((8, 32, 32)), "label": np.zeros((8, 32, 32), np.int32)}
        lanes = device_mesh.batch_sharding(mesh)
        batch = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=lanes) for k, v in batch.items()
        }
        step = train.shard_step(
            TrainingPlan.from_config(config),
            mesh,
            graphdef,
            params,
            frozen,
            batch,
            epoch_size=9,
            seed=0,
        )
    return step.state, make_loader(9, batch_size=8, seed=0)


def restored(workdir, abstract):
    """The newest state as numbers."""
    with checkpoint.Checkpoints(workdir) as checkpoints:  # a UserError closes it too
        state = checkpoints.restore(*abstract)
    return jax.device_get(jax.tree.leaves(state))


def some_of(kinds, at, count=2):
    """So many of the kinds for a file, others for the next one: all have their turn in a few."""
    return [kinds[(count * at + more) % len(kinds)] for more in range(count)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    finished, abstract, sealed, every, tmp_path
):
    """Every file of it. Without its hashes (killed before they were written), a flipped bit of an
    array is not noticed."""
    draw = random.Random(0)
    whole, before = (restored(copied(finished, tmp_path / str(n), n), abstract) for n in (6, 4))
    workdir, folder = tmp_path / "6", tmp_path / "6" / "checkpoints" / "6"
    if not sealed:
        (folder / "sha256.json").unlink()
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    spare, told = tmp_path / "spare", 0
    shutil.copytree(folder, spare)
    kinds = KINDS if sealed else KINDS[:-1]
    for at, name in enumerate(names):
        for kind in kinds if every else some_of(kinds, at, 1):
            if not damage(folder / name, kind, draw):
                continue
            try:
                state = restored(workdir, abstract)
            except UserError as error:
                told += 1
                assert f"checkpoint {folder} cannot be read (" in str(error)
                assert str(error).endswith("; delete that folder to resume from 4")
                assert len(str(error).splitlines()) == 1
            else:
                assert all(np.array_equal(a, b) for a, b in zip(state, whole, strict=True)), name
                top = (str(name) == "sha256.json" and kind == "missing") or "/" not in str(name)
                assert top or not sealed, (name, kind)
            shutil.rmtree(folder)
            shutil.copytree(spare, folder)
    assert told > (60 if sealed else 20) / (1 if every else 5 if sealed else 4)
    shutil.rmtree(folder)  # as it was told
    state = restored(workdir, abstract)
    assert all(np.array_equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damaged_parameters_of_the_best_step_are_not_passed_over(every, tmp_path):
    """They are not the newest: where they cannot be read, nothing takes their place unsaid."""
    params, draw, told = {"w": jax.numpy.arange(1000.0)}, random.Random(0), 0
    with best_parameters.BestCheckpoint(tmp_path) as best:
        best.save(params, 3, 0.5)
    abstract = {"w": jax.ShapeDtypeStruct((1000,), np.float32, sharding=params["w"].sharding)}
    folder, spare = tmp_path / "best" / "0", tmp_path / "spare"
    shutil.copytree(folder, spare)
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    for at, name in enumerate(names):
        for kind in KINDS if every else some_of(KINDS, at):
            if damage(folder / name, kind, draw):
                try:
                    record = best_parameters.best_record(tmp_path)
                    found = best_parameters.restore_params(tmp_path, abstract, best=True)
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


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_workdir_is_said(root, finished, name, every, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workdirs, "run_evaluation", lambda *_: "evaluated")
    kinds = ("missing", *some_of(KINDS[1:-1], FILES.index(name), 1))
    if every:
        kinds = ("missing", "garbage") if name in HARMLESS else KINDS[:-1]
    elif name in HARMLESS:
        kinds = ("garbage",)
    for kind in kinds:
        workdir = copied(finished, tmp_path / kind)
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
    workdir = copied(finished, tmp_path / "run")
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds checkpoints but no config.json; restore it"):
        again(root, workdir)


def test_other_data_is_another_run(root, finished, tmp_path):
    workdir, other = copied(finished, tmp_path / "run"), tmp_path / "other"
    shutil.copytree(root, other, ignore=shutil.ignore_patterns("cache"))
    shutil.copy(other / "images" / "a.nii.gz", other / "images" / "b.nii.gz")
    with pytest.raises(
        UserError, match=r"the training data has changed since the run in .* started"
    ):
        again(root, workdir, data__root=str(other), data__verify=False)
    table = json.loads((root / "table.json").read_text())
    table["classes"][0]["name"] = "kidney"
    (other / "table.json").write_text(json.dumps(table))
    split = dataset.Split([], [], [], load_label_table(other / "table.json"))
    with pytest.raises(UserError, match=r"labels.json has other classes"):
        resumption.check_split(workdir, split)


def test_another_file_of_the_cnn_is_another_run(root, tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "run_evaluation", lambda *_: "evaluated")
    own = {"model__cnn_base": str(tmp_path / "cnn"), "fewshot__count": 9}
    own |= {"data__cache_dir": str(root / "cache"), "log__checkpoint_steps": 6}
    config = config_for(root, **TINY, **NOISE, **own)

    def begin(value):
        tensors = {"kernel": np.full((16, 3), value), "bias": np.zeros(3)}
        tensors = {name: np.float32(array) for name, array in tensors.items()}
        save_file(tensors, tmp_path / "cnn.safetensors", {"format": resnet_weights.FORMAT})
        with tiny_method.known(), mock.patch.object(tiny_method.Tiny, "cnn_prefix", "first"):
            return train.train(config, tmp_path / "run")

    assert begin(0.1) == "evaluated"
    origin = tmp_path / "run" / "provenance.json"
    assert json.loads(origin.read_text())["cnn_base"] == file_digest(tmp_path / "cnn.safetensors")
    said = r"the file of model\.cnn_base has changed since the run in .* started"
    with pytest.raises(UserError, match=said):
        begin(0.2)
    assert begin(0.1) == "evaluated"
