"""Processes for tests: started with simulated devices, awaited, and what they said."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

from tests.support.places import QUICK_FLAGS, REPOSITORY

KNOWING = REPOSITORY / "tests" / "support" / "knowing"  # in PYTHONPATH: see there
SCRIPT = REPOSITORY / "tests" / "support" / "processes.py"
DEADLINE = 240  # seconds that anything here may take on a busy machine


def environment(devices: int, *folders) -> dict:
    """Variables of a process with so many simulated devices; folders more in PYTHONPATH."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_FLAGS}"
    paths = ":".join(map(str, (*folders, REPOSITORY)))
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "PYTHON": sys.executable}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(*command, devices=2, program=sys.executable, folders=()) -> subprocess.Popen:
    """A Python script, or another program, started; folders: more in PYTHONPATH."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [program, *map(str, command)]
    options = {"env": environment(devices, *folders), "cwd": REPOSITORY, "start_new_session": True}
    return subprocess.Popen(command, **options, **pipes)


def both(scenario, *folder, counts=(2, 2), start=start):
    """Two processes of a scenario of `processes.py`, started, as `forks.starting` does it or so."""
    address = f"localhost:{free_port()}"
    return [start(SCRIPT, address, counts[i], i, scenario, *folder) for i in (0, 1)]


def ends(*processes):
    """(exit code, standard output, what was said of errors) of each."""
    ended = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=DEADLINE)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        ended.append((process.returncode, out, " ".join(said) or err[-2000:]))
    return ended
