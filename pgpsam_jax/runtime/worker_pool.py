"""Host work beside the device's: processes that score while it predicts, a thread that reads ahead.

The processes are started afresh (a fork after JAX has threads may hang) and get their jobs over
pipes. Unlike those of `multiprocessing` they do not import the program's main module, and so no
JAX; they end when their pipe closes, even if this process is killed.
"""

import collections
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pgpsam_jax.data.io import array_checks
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.preemption import SIGNALS

# Starting two processes (1.1 s of a core each) takes as long as scoring and drawing so many voxels.
_WORTHWHILE = 20_000_000
# Asks a process to end, with the file that it writes removed; none that a terminal or scheduler
# sends, or the parent would have to know who meant whom.
_END = getattr(signal, "SIGUSR2", signal.SIGTERM)
_PATIENCE = 5.0  # seconds until it is killed


class Work(NamedTuple):
    """What the processes do, and the setting that says how many, for messages."""

    does: str
    setting: str


SCORING = Work("scores or writes predictions", "eval.workers")


def check(setting: int, work: Work = SCORING) -> None:
    """Refuse a number of processes that means nothing."""
    if setting < -1:
        raise UserError(
            f"{work.setting} is {setting}; give a number of processes, 0 to work in this one, or "
            "-1 for one per core"
        )


def worker_count(setting: int, jobs: int, voxels: int, work: Work = SCORING) -> int:
    """Processes for so many volumes of so many voxels in all; 0 where they would not pay.

    setting: -1 is one per core that this process may use, a number is taken as it is; there are
    never more than jobs.
    """
    check(setting, work)
    if setting != -1:
        return min(setting, jobs)
    if jobs < 2 or voxels < _WORTHWHILE:
        return 0
    affinity = hasattr(os, "sched_getaffinity")
    return min(len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1, jobs)


def in_order(function: Callable, jobs: Iterable, workers: int, work: Work = SCORING) -> Iterator:
    """`function(job)` of every job in the order of the jobs, worked off by processes.

    jobs: a generator that makes a job while earlier ones are worked on; at most `workers` + 1
    exist at a time. 0 workers: each is done here before the next is made. The function belongs to
    a module without JAX; its errors come back as they are. `UserError` where a process is killed.
    """
    if not workers:
        yield from map(function, jobs)
        return
    pool = _Pool(workers, work)
    try:
        pending = collections.deque()
        for job in jobs:
            pending.append(pool.submit(function, job))
            del job  # else it would stay until the next one is complete
            while pending and (len(pending) > workers or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close()


def ahead(function: Callable, items: Iterable) -> Iterator:
    """`function(item)` of every item in order; a thread is one item ahead of the caller."""
    pending, thread = collections.deque(), ThreadPoolExecutor(1)
    try:
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Never joined: where an error leaves the generator to the garbage collector, that may run
        # while a thread starts, with the lock in hand that joining takes.
        thread.shutdown(wait=False, cancel_futures=True)


class _Pool:
    """Threads that each hold one process, started when there is more work than idle threads."""

    def __init__(self, workers: int, work: Work):
        self._threads, self._work = ThreadPoolExecutor(workers), work
        self._local, self._processes = threading.local(), []

    def submit(self, function, job):
        return self._threads.submit(self._run, function, job)

    def _run(self, function, job):
        if not hasattr(self._local, "process"):
            self._local.process = _start()
            self._processes.append(self._local.process)
        process = self._local.process
        try:
            pickle.dump((function, job), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            done, answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise UserError(_obituary(process.wait(), self._work)) from error
        if not done:
            raise answer
        return answer

    def close(self) -> None:
        """End all processes, with or without work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.send_signal(_END)
        deadline = time.monotonic() + _PATIENCE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
        for process in self._processes:  # its thread ends with it, and is not joined: see `ahead`
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:  # part of a job was still in its buffer
                pass


def _start() -> subprocess.Popen:
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; "
    code += f"_serve({array_checks.allowed()})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], **pipes)


def _obituary(code: int, work: Work) -> str:
    how = f"was killed (signal {-code})" if code < 0 else f"ended with code {code} (see above)"
    return (
        f"a process that {work.does} {how}; if memory is short, set {work.setting} to fewer, or to "
        "0 for none"
    )


def _ended(*_):
    raise SystemExit


def _serve(max_gib: float) -> None:
    """A worker's life: a job in, an answer out, until the pipe closes."""
    array_checks.allow(max_gib)
    for number in SIGNALS:  # they reach the whole group; the parent acts
        signal.signal(number, signal.SIG_IGN)
    signal.signal(_END, _ended)
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not get among the answers
    while True:
        try:
            function, job = pickle.load(jobs)
        except EOFError:
            return
        try:
            answer = True, function(job)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = False, error
        del job
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
