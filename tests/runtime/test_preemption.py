"""Signals: what they do when, to one process; `test_processes` has several. No model."""

import os
import signal
import threading

import pytest

from pgpsam_jax.errors import AGAIN, Interrupted
from pgpsam_jax.runtime import preemption
from tests.support.faults import await_that
from tests.support.launcher import start
from tests.support.places import REPOSITORY

pytestmark = pytest.mark.faults
PROGRAMS = REPOSITORY / "tests" / "support" / "signal_programs.py"


def begun(scenario, folder):
    """A program of `signal_programs.py` that is where the signal is to reach it."""
    process = start(PROGRAMS, scenario, folder)
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
        f"stopped: {name} received, step {step} is saved; the same command resumes from there\n"
    )


@pytest.mark.parametrize("scenario", ["read", "compile_"])
def test_where_nothing_is_lost_the_end_comes_at_once(scenario, tmp_path):
    process = begun(scenario, tmp_path)
    process.terminate()
    code, _, said = _end(process)
    assert code == AGAIN
    assert said.strip() == "stopped: SIGTERM received; the same command resumes from what is saved"


def test_a_second_interrupt_does_not_wait(tmp_path):
    process = begun("hang", tmp_path)
    process.send_signal(signal.SIGINT)
    assert "finishing the step" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, _, said = _end(process)
    assert code == 130 and "interrupted twice; unsaved progress is lost" in said


def _end(process):
    out, said = process.communicate(timeout=60)
    return process.returncode, out, said


def test_nothing_happens_to_programs_that_do_not_listen():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.defer_to_step(0) as stop:
        assert not stop.should_stop(1)
    with preemption.handle_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        with pytest.raises(Interrupted, match="SIGTERM received"):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_a_signal_after_the_last_step_ends_the_block():
    with (
        preemption.handle_signals(),
        pytest.raises(Interrupted, match="resumes from what is saved"),
    ):
        with preemption.defer_to_step(0):
            os.kill(os.getpid(), signal.SIGTERM)
            assert await_that(preemption.current().requested.is_set)
            reached = True
    assert reached


def test_a_signal_before_the_first_step_ends_the_block():
    with preemption.handle_signals():
        preemption.current().reason = "SIGTERM"  # as the watching thread has it, before Python
        with pytest.raises(Interrupted, match="SIGTERM received"):
            with preemption.defer_to_step(0):
                raise AssertionError("it has begun")
