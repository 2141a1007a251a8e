"""Processes that begin with everything imported, which is nearly all that a start costs.

python forks.py SOCKET MODULE ...: the server, which has the modules, but neither thread nor backend
of its own. For each job it forks a guardian; that forks the job and tells how it ended. A job is a
script or -m with a module, run and ended as an interpreter does it, but not restarted.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from pgpsam_jax.runtime import malloc
from tests.support.launcher import DEADLINE, environment
from tests.support.places import REPOSITORY


class Forked:
    """A job, to be read, signalled and awaited like a `subprocess.Popen`."""

    def __init__(self, server, command, devices):
        self.args, self.returncode = [str(word) for word in command], None
        pipes = [os.pipe() for _ in range(3)]
        message = json.dumps([self.args, environment(devices)]).encode()
        socket.send_fds(server, [message], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr = (open(read) for read, _ in pipes[:2])
        self._status = open(pipes[2][0], "rb", buffering=0)
        self.pid = int(self._status.readline())

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.readline())
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # just now
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        said = [None, None]

        def read(place, pipe):
            said[place] = pipe.read()

        pipes = enumerate((self.stdout, self.stderr))
        threads = [threading.Thread(target=read, args=pair, daemon=True) for pair in pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        self.wait(timeout)
        if None in said:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return said


@contextlib.contextmanager
def starting(*modules):
    """A function in the place of `launcher.start`, for Python; with modules imported."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno()), *modules]
    options = {"env": environment(1), "cwd": REPOSITORY, "start_new_session": True}
    options |= {"stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]}
    with subprocess.Popen(command, **options) as server, ours:
        theirs.close()
        yield lambda *command, devices=2: Forked(ours, command, devices)
        ours.close()
        server.wait(DEADLINE)


def _serve(jobs):
    """Fork for each job; returns its command in the process that is to run it, and None at last."""
    while True:
        message, pipes, *_ = socket.recv_fds(jobs, 2**16, 3)
        if not message:
            break
        if not os.fork():
            return _guard(jobs, *pipes, *json.loads(message))
        for pipe in pipes:
            os.close(pipe)
    signal.alarm(10)  # whatever still runs is not waited for
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _guard(jobs, out, err, status, command, variables):
    jobs.close()
    job = os.fork()
    if job:
        os.close(out)
        os.close(err)
        os.write(status, b"%d\n" % job)
        _, ended = os.waitpid(job, 0)
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
        os._exit(0)
    os.close(status)
    os.setsid()
    for pipe, place in ((out, 1), (err, 2)):
        os.dup2(pipe, place)
        os.close(pipe)
    os.environ.clear()
    os.environ.update(variables)
    settled = [f"{name}={value}" for name, value in malloc._WANTED.items()]
    os.environ[malloc._VARIABLE] = ":".join(settled)
    return command


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    if sys.argv:
        sys.orig_argv[1:] = sys.argv
        if sys.argv[0] == "-m":
            sys.argv, sys.path[0] = sys.argv[1:], os.getcwd()
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
