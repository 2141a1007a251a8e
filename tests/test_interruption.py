"""Signals: what they do when, to one process and to several; no model."""

import os
import random
import signal
import threading

import pytest
from faults import await_that
from launcher import start
from places import REPOSITORY

from pgpsam_jax.distributed import heartbeat
from pgpsam_jax.errors import AGAIN, Interrupted
from pgpsam_jax.runtime import preemption

pytestmark = pytest.mark.faults
HEED = REPOSITORY / "tests" / "heed.py"


def begun(scenario, folder):
    """A program of `heed.py` that is where the signal is to reach it."""
    process = start(HEED, scenario, folder)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", sorted(set(preemption.SIGNALS)))
def test_a_step_is_finished_and_saved(number, tmp_path):
    process = begun("train", tmp_path)
    process.send_signal(number)
    code, _, said = _end(process)
    step = (tmp_path / "saved").read_text()
    assert code == AGAIN and int(step) >= 3
    name = signal.Signals(number).name
    assert said.count(f"{name}: finishing the step and saving") == 1
    assert said.endswith(
        f"stopped: {name} came, step {step} is saved; the same command goes on from there\n"
    )


@pytest.mark.parametrize("scenario", ["read", "compile_"])
def test_where_nothing_is_lost_the_end_comes_at_once(scenario, tmp_path):
    process = begun(scenario, tmp_path)
    process.terminate()
    code, _, said = _end(process)
    assert code == AGAIN
    assert said.strip() == ("stopped: SIGTERM came; the same command goes on from what is saved")


def test_a_second_interrupt_does_not_wait(tmp_path):
    process = begun("hang", tmp_path)
    process.send_signal(signal.SIGINT)
    assert "finishing the step" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, _, said = _end(process)
    assert code == 130 and "interrupted twice; what was not saved is lost" in said


def _end(process):
    out, said = process.communicate(timeout=60)
    return process.returncode, out, said


def test_nothing_happens_to_programs_that_do_not_listen():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.deferred() as stop:
        stop.begin(0)
        assert not stop.due(1)
    with preemption.listening():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        with pytest.raises(Interrupted, match="SIGTERM came"):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_a_signal_after_the_last_step_ends_the_block():
    with preemption.listening(), pytest.raises(Interrupted, match="goes on from what is saved"):
        with preemption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert await_that(preemption.current().asked.is_set)
            reached = True
    assert reached


class Store:
    """The key-value store of JAX's coordinator, as far as `Peers` uses it."""

    def __init__(self):
        self._values, self._lock = {}, threading.Lock()

    def key_value_set(self, key, text, allow_overwrite=False):
        with self._lock:
            self._values[key] = text

    def key_value_dir_get(self, folder):
        with self._lock:
            return [(k, v) for k, v in self._values.items() if k.startswith(f"{folder}/")]


@pytest.mark.parametrize("seed", range(12))
def test_processes_agree_on_the_last_step(seed, monkeypatch):
    """Three, up to three steps apart as on devices, one of them asked at a moment of its own."""
    draw, store, count = random.Random(seed), Store(), 3
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "HURRY_SECONDS", 0.001)
    stops, members, last = [], [], [None] * count
    for process in range(count):
        monkeypatch.setattr(preemption, "_stop", preemption.Stop())
        stops.append(preemption.current())
        members.append(heartbeat.Peers(store, process, count, "nowhere:1"))
    asked, moment = draw.randrange(count), draw.randrange(30)
    pauses = [draw.choice([0, 1e-4, 1e-3]) for _ in range(count)]
    done, change = [0] * count, threading.Condition()

    def steps(process):
        stop, pause = stops[process], threading.Event()
        pause.wait(draw.uniform(0, 0.02))  # they do not begin together
        stop.begin(0)
        for step in range(1, 10**9):
            if process == asked and step == moment:
                stop.ask("SIGTERM")
            pause.wait(pauses[process])
            with change:
                done[process] = step
                change.notify_all()
                change.wait_for(lambda step=step: step - min(done) <= 3)
            if stop.due(step):
                last[process] = step
                return

    threads = [threading.Thread(target=steps, args=(i,), daemon=True) for i in range(count)]
    if not moment:
        stops[asked].ask("SIGTERM")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for member in members:
        member.close()
    assert last[0] == last[1] == last[2] is not None and last[0] >= moment
    assert {stop.reason for stop in stops} == {"SIGTERM"}
