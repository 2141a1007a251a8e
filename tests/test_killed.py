"""Runs that are killed or stopped at any moment go on to the very same end."""

import itertools
import random
import signal
import time

import pytest
from faults import TINY, await_that, begin, logged, newest, prepare, records, rubbish, saving
from launcher import ends

from pgpsam_jax.errors import AGAIN

pytestmark = pytest.mark.faults
SAVES = 20  # steps between two checkpoints
# Seconds after a moment within which a run is ended.
LONGEST = {"starting": 6.0, "training": 1.0, "saving": 0.05}


def configuration(steps, **settings):
    return {"train__steps": steps, "log__checkpoint_steps": SAVES} | settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("data"), **TINY | configuration(300))


def uninterrupted(root, workdir):
    [(code, _, said)] = ends(begin(root, workdir))
    assert code == 0, said
    return workdir


class Trial:
    """A run that is ended again and again; after each end, what it keeps is checked."""

    def __init__(self, root, workdir, seed):
        self.root, self.workdir, self.random = root, workdir, random.Random(seed)
        self.kills, self.during_saves, self.lost, self.done = 0, 0, [], False

    def start(self):
        self.before, self.log = newest(self.workdir), _identity(self.workdir)
        self.process = begin(self.root, self.workdir)

    def reach(self, moment):
        """Wait for a moment of the run's life; whether it came before the end."""
        old, step, log = saving(self.workdir), self.before, self.log

        def trains():  # a run writes the log anew before it adds to it
            return logged(self.workdir) > step and _identity(self.workdir) != log

        conditions = {
            "starting": lambda: True,
            "training": trains,
            "saving": lambda: trains() and saving(self.workdir) - old,
        }
        if await_that(conditions[moment], self.process, pause=0.001):
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
        assert f"{signal.Signals(number).name} came" in said, said
        assert "the same command goes on from" in said, said
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


def test_killed_and_stopped_runs_go_on_as_if_nothing_had_been(root, tmp_path):
    trial = Trial(root, tmp_path / "run", seed=0)
    trial.kill("saving")
    trial.stop(signal.SIGTERM)
    trial.kill("training")
    trial.kill("saving")
    assert trial.kills == 3 and trial.during_saves
    trial.finish(uninterrupted(root, tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("method", "steps", "kills"), [("tiny", 6000, 36), ("pgpsam", 400, 8)], ids=["tiny", "pgpsam"]
)
def test_many_kills(method, steps, kills, tmp_path, record_property):
    settings = dict.fromkeys(("model__cfm", "model__ppr", "model__ppg"), False)
    settings |= TINY | configuration(steps, model__name=method)
    root = prepare(tmp_path / "data", **settings)
    reference = uninterrupted(root, tmp_path / "whole")
    moments = itertools.cycle(["saving", "training", "saving", "starting"])
    ended, trial = [], Trial(root, tmp_path / "run", seed=1)
    while sum(t.kills for t in ended) + trial.kills < kills:
        trial.kill(next(moments))
        if trial.done:  # nothing was left to kill: another run
            ended.append(trial)
            trial = Trial(root, tmp_path / f"run{len(ended)}", seed=1 + len(ended))
    trial.finish(reference)
    trials = [*ended, trial]
    for name in ("kills", "during_saves"):
        record_property(name, sum(getattr(t, name) for t in trials))
        print(name, sum(getattr(t, name) for t in trials))
    print("most steps lost", max(n for t in trials for n in t.lost))
    assert sum(t.during_saves for t in trials) >= kills // 4
