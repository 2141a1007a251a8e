"""A run of two processes with four devices each is the run of one process with eight."""

import functools
import json
import shutil
import time

import jax
import numpy as np
import pytest

from pgpsam_jax.checkpointing import checkpoint, checksums
from pgpsam_jax.distributed.initialize import PEER_LOST
from pgpsam_jax.evaluation import workdirs
from pgpsam_jax.methods import build, registry
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import train
from tests.support import few_steps, forks, tiny_method
from tests.support.faults import NOISE, TINY, prepare
from tests.support.launcher import DEADLINE, KNOWING, ends, free_port
from tests.support.launcher import start as start_any
from tests.support.places import REPOSITORY
from tests.support.small_run import config_for, write_data

LAUNCH = REPOSITORY / "experiments" / "launch"
MESH = {"data": 1, "fsdp": 8, "tensor": 1}  # no process has all of the weights
STEPS, CUT = 4, 2
SETTINGS = {"train__steps": STEPS, "log__checkpoint_steps": CUT, "validation__every_epochs": 3}
# What compiles soonest and still has weights of both kinds that are spread.
SMALL = {"model__train_encoder": "frozen", "eval__overlays": False}
SMALL |= {"model__cfm": False, "model__ppr": False, "model__ppg": False}


@pytest.fixture(scope="module", params=["tiny", "pgpsam"])
def settings(request):
    """Of the run; the method that costs little is known here and to all that is started."""
    with tiny_method.known(), tiny_method.spread():
        yield SETTINGS | (TINY | NOISE if request.param == "tiny" else SMALL)


start = functools.partial(start_any, folders=(KNOWING,))
# For what is alike with any model, and costs processes of its own.
tiny_alone = pytest.mark.parametrize("settings", ["tiny"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def root(settings, tmp_path_factory):
    """Two training cases, one to validate, two to test; and the configuration as a file."""
    root = prepare(tmp_path_factory.mktemp("data"), **settings)
    write_data(root, cases=("a", "b", "v", "c", "d"))
    parts = {"train": ["a", "b"], "validation": ["v"], "test": ["c", "d"]}
    (root / "split.json").write_text(json.dumps(parts))
    return root


def flags(root, workdir, mesh, **settings):
    values = {f"mesh.{axis}": size for axis, size in mesh.items()} | settings
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config", root / "config.py", "--workdir", workdir, *arguments]


def two(root, workdir, mesh=MESH):
    """The run in two processes with four devices each; what process 0 printed."""
    launch = LAUNCH / "gpus.sh"
    [(code, out, said)] = ends(
        start(2, *flags(root, workdir, mesh), devices=4, program=str(launch))
    )
    assert code == 0, said
    return out


def one(root, workdir, settings, mesh=MESH):
    """The run in this process, which has eight devices."""
    config = config_for(root, **settings)
    config.mesh.update(mesh)
    return train.train(config, workdir)


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in found]


def difference(ours, theirs) -> float:
    """Largest difference of any logged number relative to its size: 6e-7 was measured."""
    assert [r.keys() for r in ours] == [r.keys() for r in theirs]
    pairs = [(a[k], b[k]) for a, b in zip(ours, theirs, strict=True) for k in a]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-6) for a, b in pairs)


def cut(workdir, into):
    """A copy of a run as it stood after step `CUT`."""
    shutil.copytree(workdir, into)
    shutil.rmtree(into / "checkpoints" / str(STEPS))
    shutil.rmtree(into / "best")
    return into


def files(workdir):
    return {
        str(path.relative_to(workdir))
        for path in workdir.rglob("*")
        if path.is_file() and path.relative_to(workdir).parts[0] not in ("checkpoints", "best")
    }


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def alone(root, settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    one(root, workdir, settings)
    return workdir


@pytest.fixture(scope="module")
def shared(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "shared"
    return workdir, two(root, workdir)


@pytest.fixture(scope="module")
def start_quickly():
    with forks.starting(
        "tests.support.few_steps", "pgpsam_jax.distributed.initialize", "orbax.checkpoint", "grain"
    ) as start:
        yield start


def test_steps_of_two_processes_are_those_of_one(start_quickly, tmp_path):
    """And one process reads what both have saved."""
    address = f"localhost:{free_port()}"
    script = REPOSITORY / "tests" / "support" / "few_steps.py"
    settings = {"name": tiny_method.NAME} | NOISE
    fields = [f"{name}={value!r}" for name, value in settings.items()]
    processes = [
        start_quickly(script, "--of", f"{address},2,{i},{tmp_path}", *fields, devices=4)
        for i in (0, 1)
    ]
    with tiny_method.known(), tiny_method.spread():
        _, state, loader, alone = few_steps.trained(settings, MESH)
    ended = ends(*processes)
    assert [code for code, *_ in ended] == [0, 0], ended
    for _, out, _ in ended:
        both = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert len(both) == len(alone) == few_steps.STEPS and difference(both, alone) < 1e-5
    leaves = jax.tree.leaves(state)
    assert not all(leaf.is_fully_replicated for leaf in leaves)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        like = checkpoint.abstract_like(state, few_steps.sharding_of(state))
        found = checkpoints.restore(like, loader)
    for ours, theirs in zip(jax.tree.leaves(found), leaves, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_weights_of_both_kinds_are_spread(root, settings):
    config = config_for(root, **settings)
    mesh, method = device_mesh.make_mesh(**MESH), registry.key_of(config.model)
    for tree in build.abstract_model(config.model, 3)[1:]:
        found = jax.tree.leaves(device_mesh.state_shardings(tree, mesh, method))
        assert not all(one.is_fully_replicated for one in found)


@pytest.mark.slow
def test_two_processes_train_what_one_does(alone, shared):
    workdir, out = shared
    assert difference(records(workdir), records(alone)) < 1e-5
    assert files(workdir) == files(alone)
    assert out.count("2 process(es)") == out.count("mesh {") == 1  # said once


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(shared, tmp_path):
    """Each had one of the two cases, on four devices; all are written as by one with eight."""
    workdir, ours = shared[0], shared[0] / "evaluation"
    again = tmp_path / "again"
    shutil.copytree(workdir, again, ignore=shutil.ignore_patterns("evaluation", "cache"))
    workdirs.evaluate_workdir(again)
    assert len(contents(ours)) == 4 + 2
    assert contents(again / "evaluation") == contents(ours)


@pytest.mark.slow
@tiny_alone
def test_two_processes_evaluate_a_run_again(shared, tmp_path):
    workdir, again = shared[0], tmp_path / "again"
    shutil.copytree(workdir, again, ignore=shutil.ignore_patterns("evaluation", "cache"))
    arguments = [2, "--mode", "evaluate", "--workdir", again]
    [(code, _, said)] = ends(start(*arguments, devices=4, program=str(LAUNCH / "gpus.sh")))
    assert code == 0, said
    assert contents(again / "evaluation") == contents(workdir / "evaluation")


@pytest.mark.slow
def test_one_process_goes_on_from_a_checkpoint_of_two(root, settings, shared, tmp_path):
    workdir = cut(shared[0], tmp_path / "cut")
    position = workdir / "checkpoints" / str(CUT) / "data" / "position.json"
    position.rename(position.with_name("process_0-of-1.json"))  # as grain wrote it before,
    (position.parents[1] / checksums.FILE).unlink()  # when there were no hashes
    one(root, workdir, settings)
    assert difference(records(workdir), records(shared[0])) < 1e-5


@pytest.mark.slow
@tiny_alone
def test_two_processes_go_on_from_a_checkpoint_of_one(root, alone, tmp_path):
    workdir = cut(alone, tmp_path / "cut")
    two(root, workdir)
    assert difference(records(workdir), records(alone)) < 1e-5


@pytest.mark.slow
@tiny_alone
def test_one_device_goes_on_from_a_checkpoint_of_eight(root, shared, tmp_path):
    workdir, mesh = cut(shared[0], tmp_path / "cut"), dict.fromkeys(MESH, 1)
    command = ["-m", "pgpsam_jax.main", *flags(root, workdir, mesh)]
    [(code, out, said)] = ends(start(*command, devices=1))
    assert code == 0 and f"resumed from step {CUT}" in out, said
    assert difference(records(workdir), records(shared[0])) < 1e-5


@pytest.mark.slow
@tiny_alone
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_training(root, tmp_path, killed):
    address = f"localhost:{free_port()}"
    command = ["-m", "pgpsam_jax.main", *flags(root, tmp_path, MESH, **{"train.steps": 100_000})]
    place = ["--coordinator", address, "--processes", 2, "--process"]
    processes = [start(*command, *place, i, devices=4) for i in (0, 1)]
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + DEADLINE
    while not metrics.is_file() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[killed].kill()
    start_of_end = time.monotonic()
    [(code, _, said)] = ends(processes[1 - killed])
    assert code == PEER_LOST and f"process {killed} of 2 has ended without a word" in said, said
    assert f"to resume {tmp_path} from the last checkpoint" in said
    assert time.monotonic() - start_of_end < 90  # as docs/distributed.md promises
    ends(processes[killed])
