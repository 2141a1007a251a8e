"""Worker processes that score while the device predicts, and a thread that reads ahead.

The processes are spawned (a fork after JAX has started threads may hang) by loky, whose workers
do not import the main module of the program and thus no JAX.
"""

import collections
import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.preemption import SIGNALS

# Starting two processes (1.1 s of a core each) takes as long as scoring and drawing these voxels.
_WORTHWHILE = 20_000_000
# Tells a worker to abandon its job and remove its temporary file. Terminals and schedulers never
# send this signal.
_STOP = getattr(signal, "SIGUSR2", signal.SIGTERM)
_PATIENCE = 5.0  # seconds until a worker is killed


_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Work(NamedTuple):
    """What the workers do and the setting for their number, for error messages."""

    does: str
    setting: str


SCORING = Work("scores or writes predictions", "eval.workers")


def check(setting: int, work: Work = SCORING) -> None:
    """Raises a `UserError` for an invalid number of workers."""
    if setting < -1:
        raise UserError(
            f"{work.setting} is {setting}; give a number of processes, 0 to work in this one, or "
            "-1 for one per core"
        )


def worker_count(setting: int, jobs: int, voxels: int, work: Work = SCORING) -> int:
    """Returns the number of worker processes, at most one per job.

    Args:
        setting: number of workers, or -1 for one per core available to this process unless the
            jobs are too small to be worth starting processes for.
        jobs: number of volumes.
        voxels: number of voxels of all volumes together.
        work: names the setting in the error message.
    """
    check(setting, work)
    if setting != -1:
        return min(setting, jobs)
    if jobs < 2 or voxels < _WORTHWHILE:
        return 0
    affinity = hasattr(os, "sched_getaffinity")
    return min(len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1, jobs)


def map_in_order(
    function: Callable[[_Job], _Result],
    jobs: Iterable[_Job],
    workers: int,
    work: Work = SCORING,
    initializer: Callable[[], object] = int,
) -> Iterator[_Result]:
    """Yields `function(job)` for each job in order, computed by worker processes.

    Args:
        function: from a module that does not import JAX; its exceptions are raised here.
        jobs: may be a generator, which runs while the workers do; at most `workers` + 1 jobs exist
            at a time.
        workers: 0 computes each result in this process.
        work: names the work and its setting in the error message.
        initializer: called once in each worker.

    Raises:
        UserError: a worker was killed.
    """
    if not workers:
        yield from map(function, jobs)
        return
    from loky import ProcessPoolExecutor  # imported late: 0.1 s

    pool = ProcessPoolExecutor(workers, initializer=_initialize, initargs=(initializer,))
    pending: collections.deque[Future[_Result]] = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(_work, function, job))
            del job  # frees its memory before the next one is made
            while pending and (len(pending) > workers or pending[0].done()):
                yield pending[0].result()
                pending.popleft()
        while pending:
            yield pending[0].result()
            pending.popleft()
    except BrokenExecutor as error:
        raise _killed(error, work) from error
    finally:
        _shut_down(pool, pending)


def map_ahead(function: Callable[[_Job], _Result], items: Iterable[_Job]) -> Iterator[_Result]:
    """Yields `function(item)` for each item in order; a thread works one item ahead."""
    pending: collections.deque[Future[_Result]] = collections.deque()
    thread = ThreadPoolExecutor(1)
    try:
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Not joined: the garbage collector may close the generator while a thread starts, holding
        # the lock that joining needs.
        thread.shutdown(wait=False, cancel_futures=True)


def _shut_down(pool: Any, pending: Iterable[Future[Any]]) -> None:
    """Ends all workers; interrupted jobs get time to remove their temporary files."""
    processes = list(pool._processes.values())
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, _STOP)
    wait(pending, _PATIENCE)
    pool.shutdown(wait=False, kill_workers=True)  # not joined: see `map_ahead`
    for process in processes:
        process.join(_PATIENCE)


def _killed(error: Exception, work: Work) -> UserError:
    code = re.search(r"\((-?\d+)\)", str(error))
    how = f" (signal {code[1][1:]})" if code and code[1].startswith("-") else ""
    return UserError(
        f"a process that {work.does} was killed{how}; if memory is short, set {work.setting} to "
        "fewer, or to 0 for none"
    )


class _Worker:
    """State of a worker process."""

    busy = stopped = False


def _initialize(initializer: Callable[[], object]) -> None:
    for number in SIGNALS:  # sent to the whole process group; the parent handles them
        signal.signal(number, signal.SIG_IGN)
    signal.signal(_STOP, _stop)
    threading.Thread(target=_exit_with_parent, args=[os.getppid()], daemon=True).start()
    initializer()


def _stop(*_: object) -> None:
    _Worker.stopped = True
    if _Worker.busy:
        raise SystemExit


def _exit_with_parent(parent: int) -> None:
    """Ends this process if its parent is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(function: Callable[[_Job], _Result], job: _Job) -> _Result | None:
    _Worker.busy = True
    try:
        return None if _Worker.stopped else function(job)
    finally:
        _Worker.busy = False
