"""Runs that are killed or stopped at any moment go on to the very same end."""

import functools
import itertools
import random
import signal
import time

import pytest

from pgpsam_jax.errors import AGAIN
from tests.support import forks
from tests.support.faults import (
    NOISE,
    TINY,
    await_that,
    begin,
    logged,
    newest,
    prepare,
    records,
    rubbish,
    saving,
)
from tests.support.launcher import ends, free_port

pytestmark = pytest.mark.faults
STEPS = 120
SAVES = 20  # steps between two checkpoints
# Seconds after a moment within which a run is ended.
LONGEST = {"starting": 6.0, "training": 0.3, "saving": 0.05}


def configuration(steps, **settings):
    numbers = {"train__steps": steps, "log__checkpoint_steps": SAVES, "train__batch_size": 2}
    return numbers | settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"), **TINY | NOISE | configuration(STEPS))


@pytest.fixture(scope="module")
def start():
    """As `launcher.start`; with all that a run imports, here and there."""
    names = ["main", "training.train", "distributed.initialize", "evaluation.evaluate"]
    modules = [f"pgpsam_jax.{name}" for name in names]
    with forks.starting(*modules, "orbax.checkpoint", "grain", "matplotlib.figure") as start:
        yield start


def uninterrupted(start, root, workdir):
    [(code, _, said)] = ends(begin(root, workdir, start=start))
    assert code == 0, said
    return workdir


class Trial:
    """A run that is ended again and again; after each end, what it keeps is checked."""

    def __init__(self, start, root, workdir, seed):
        self.begin = functools.partial(begin, root, workdir, start=start)
        self.workdir, self.random = workdir, random.Random(seed)
        self.kills, self.during_saves, self.lost, self.done = 0, 0, [], False

    def start(self):
        self.before, self.log = newest(self.workdir), _identity(self.workdir)
        self.process = self.begin()

    def reach(self, moment):
        """Wait for a moment of the run's life; whether it came before the end."""
        old, step, log = saving(self.workdir), self.before, self.log

        def trains():  # a run writes the log anew before it adds to it
            return logged(self.workdir) > step and _identity(self.workdir) != log

        conditions = {
            "starting": lambda: True,
            "training": trains,
            "saving": lambda: saving(self.workdir) - old and trains(),
        }
        pause = 0.001 if moment == "saving" else 0.01
        if await_that(conditions[moment], self.process, pause):
            until = time.monotonic() + self.random.uniform(0, LONGEST[moment])
            await_that(lambda: time.monotonic() >= until, self.process, pause=0.001)

    def end(self, number):
        """Send a signal; the exit code and what the process said."""
        self.process.send_signal(number)
        [(code, out, said)] = ends(self.process)
        if "resumed from step" in out:
            assert f"resumed from step {self.before}\n" in out
        assert newest(self.workdir) >= self.before
        self.done = code == 0
        return code, said

    def kill(self, moment):
        self.start()
        self.reach(moment)
        code, said = self.end(signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), said
        if code:
            self.kills += 1
            self.during_saves += bool(saving(self.workdir))
            self.lost.append(max(0, logged(self.workdir) - newest(self.workdir)))
            assert self.lost[-1] <= 2 * SAVES  # one complete, one on its way

    def stop(self, number):
        """A signal that asks: nothing that was done is lost."""
        self.start()
        self.reach("training")
        code, said = self.end(number)
        assert code == AGAIN, said
        assert f"{signal.Signals(number).name} received" in said, said
        assert "the same command resumes from" in said, said
        assert newest(self.workdir) >= logged(self.workdir)
        assert not rubbish(self.workdir)

    def finish(self, reference):
        """To the end: the same numbers, scores and masks as the run that nothing happened to."""
        self.start()
        [(code, _, said)] = ends(self.process)
        assert code == 0, said
        assert records(self.workdir) == records(reference)
        assert not rubbish(self.workdir)
        for name in ("cases.csv", "slices.csv", "summary.json", "predictions/c.nii.gz"):
            path = f"evaluation/{name}"
            assert (self.workdir / path).read_bytes() == (reference / path).read_bytes(), name


def _identity(workdir):
    path = workdir / "metrics.jsonl"
    return path.stat().st_ino if path.is_file() else None


@pytest.mark.slow
def test_killed_and_stopped_runs_go_on_as_if_nothing_had_been(start, root, tmp_path):
    trial = Trial(start, root, tmp_path / "run", seed=0)
    trial.kill("saving")
    trial.stop(signal.SIGTERM)
    assert trial.kills == 1
    trial.finish(uninterrupted(start, root, tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_stop_together(start, root, tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config.log.checkpoint_steps=1000000", "--coordinator", f"localhost:{free_port()}"]
    flags += ["--processes", 2, "--process"]
    processes = [begin(root, workdir, *flags, i, start=start) for i in (0, 1)]
    assert await_that(lambda: logged(workdir) >= 3, processes[0])
    processes[1].send_signal(signal.SIGUSR1)  # it reaches one of them
    ended = ends(*processes)
    assert [code for code, *_ in ended] == [AGAIN, AGAIN], ended
    step = newest(workdir)
    assert 3 <= step < STEPS
    assert all(f"stopped: SIGUSR1 received, step {step} is saved" in said for *_, said in ended)
    assert logged(workdir) == step and not rubbish(workdir)


@pytest.mark.slow
def test_many_kills(start, tmp_path, record_property):
    """That models go on where they were is seen where they train."""
    steps, kills = 800, 8
    root = prepare(tmp_path / "data", **TINY | configuration(steps))
    reference = uninterrupted(start, root, tmp_path / "whole")
    moments = itertools.cycle(["saving", "training", "saving", "starting"])
    ended, trial = [], Trial(start, root, tmp_path / "run", seed=1)
    while sum(t.kills for t in ended) + trial.kills < kills:
        trial.kill(next(moments))
        if trial.done:  # nothing was left to kill: another run
            ended.append(trial)
            trial = Trial(start, root, tmp_path / f"run{len(ended)}", seed=1 + len(ended))
    trial.finish(reference)
    trials = [*ended, trial]
    for name in ("kills", "during_saves"):
        record_property(name, sum(getattr(t, name) for t in trials))
        print(name, sum(getattr(t, name) for t in trials))
    print("most steps lost", max(n for t in trials for n in t.lost))
    assert sum(t.during_saves for t in trials) >= kills // 4
