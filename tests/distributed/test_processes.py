"""What processes of one run do together, and how they end when one of them does. No model."""

import functools
import json
import re
import signal
import socket

import pytest

from pgpsam_jax.distributed.initialize import PEER_LOST
from pgpsam_jax.errors import AGAIN
from tests.support import forks, launcher
from tests.support.launcher import SCRIPT, ends, free_port


@pytest.fixture(scope="module")
def start():
    with forks.starting(
        "pgpsam_jax.distributed.initialize", "pgpsam_jax.sharding.device_mesh"
    ) as start:
        yield start


@pytest.fixture
def both(start):
    return functools.partial(launcher.both, start=start)


def test_what_processes_do_together(both, tmp_path):
    ended = ends(*both("together", tmp_path))
    assert [code for code, *_ in ended] == [0, 0], ended
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in ended)  # after Gloo's
    assert first["spread"] and second["spread"]
    assert first["gathered_arrays"] == second["gathered_arrays"]
    assert first["gathered_arrays"]["a"][3] == [36.0, 38.0, 40.0, 42.0, 44.0, 46.0]
    assert first["gathered_arrays"]["b"] == 14
    assert first["gathered"] == second["gathered"] == ["", "x"]
    assert (first["shard"], second["shard"]) == ([0, 2, 4], [1, 3])
    assert (first["turn"], second["turn"]) == (0, 1)


SAID = {
    "mistake": (2, "there is no such volume", 2, r"process 0 of 2 on .* has ended: there is no"),
    "fault": (1, "process 1 of 2 on .* has ended: ZeroDivisionError: a fault", 1, "a fault"),
    "differ": (
        2,
        "process 1 of 2 on .* has ended: process 1 on",
        2,
        r"differ in config\.train\.batch_size: 16 here, 8 there; give all processes the same",
    ),
    "apart": (
        2,
        r"of process 1 on .* is not that of process 0 on .*; give a --workdir that all",
        2,
        r"of process 1 on .* is not that of process 0 on .*; give a --workdir that all",
    ),
}


@pytest.mark.parametrize("scenario", SAID)
def test_an_error_of_one_process_ends_both_with_its_sentence(both, scenario, tmp_path):
    (code, _, said), (other_code, _, other_said) = ends(*both(scenario, tmp_path))
    expected, sentence, other_expected, other_sentence = SAID[scenario]
    assert (code, other_code) == (expected, other_expected), (said, other_said)
    assert re.search(sentence, said), said
    assert re.search(other_sentence, other_said), other_said


@pytest.mark.parametrize(
    ("scenario", "killed"),
    [
        ("work", 0),
        ("collect", 1),
        pytest.param("work", 1, marks=pytest.mark.slow),
        pytest.param("collect", 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_other(both, scenario, killed):
    processes = both(scenario)
    for process in processes:
        assert any(line == "working\n" for line in process.stdout)  # Gloo says something before
    processes[killed].kill()
    [(code, _, said)] = ends(processes[1 - killed])
    processes[killed].communicate()
    assert code == PEER_LOST, said
    assert f"process {killed} of 2 has ended without a word" in said
    assert "with the same command to resume runs/workdir from the last checkpoint" in said


def test_processes_that_do_not_meet(start, both):
    nobody = f"localhost:{free_port()}"
    alone, unequal = start(SCRIPT, nobody, 2, 1, "work"), both("work", counts=(2, 3))
    too_few = start(SCRIPT, f"localhost:{free_port()}", 2, 0, "work")
    with socket.create_server(("", 0)) as other:
        taken = start(SCRIPT, f"localhost:{other.getsockname()[1]}", 2, 0, "work")
        [(code, _, said)] = ends(taken)
    assert code == 2 and "process 0 cannot listen on port" in said
    [(code, _, said)] = ends(too_few)
    assert code == 2 and "did not meet the others at localhost" in said
    [(code, _, said)] = ends(alone)
    assert code == 2 and f"process 1 of 2 did not meet the others at {nobody} within 8 s" in said
    assert "start process 0 there" in said
    (code, _, said), (other_code, _, other_said) = ends(*unequal)
    assert code == other_code == 2
    assert "differ in number of processes: 3 here, 2 there" in other_said


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ([1], signal.SIGUSR1),
        ([0, 1], signal.SIGTERM),
        pytest.param([0], signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param([0], signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_two_processes_stop_after_the_same_step(both, tmp_path, asked, number):
    processes = both("steps", tmp_path)
    while processes[0].stdout.readline() != "working\n":  # after Gloo's
        assert processes[0].poll() is None
    for process in asked:
        processes[process].send_signal(number)
    ended = ends(*processes)
    assert [code for code, *_ in ended] == [AGAIN, AGAIN], ended
    first, second = ((tmp_path / f"saved{i}").read_text() for i in (0, 1))
    assert first == second and int(first) >= 1003
    said = f"stopped: {signal.Signals(number).name} received, step {first} is saved"
    assert all(said in text for *_, text in ended)


def test_a_signal_where_nothing_is_saved_ends_both(both):
    """SIGTERM too, which JAX handles itself unless it is kept from it."""
    processes = both("wait")
    for process in processes:
        assert any(line == "working\n" for line in process.stdout)
    processes[1].send_signal(signal.SIGTERM)
    (*_, other_said), (*_, said) = ended = ends(*processes)
    assert [code for code, *_ in ended] == [AGAIN, AGAIN], ended
    assert "stopped: SIGTERM received; the same command resumes" in said
    assert re.search(r"process 1 of 2 on .* has ended: SIGTERM received", other_said)


def test_a_crash_keeps_its_own_exit_code(both):
    (code, _, said), (crashed, *_) = ends(*both("crash"))
    assert crashed == -signal.SIGABRT
    assert code == PEER_LOST and "process 1 of 2 has ended without a word" in said
