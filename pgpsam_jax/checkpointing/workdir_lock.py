"""Exclusive lock on a workdir; the system releases it when its holder dies, however it dies."""

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from pgpsam_jax.errors import UserError, as_user_error
from pgpsam_jax.utils.files import (
    StrPath,
    local,
    read_record,
    refuse_foreign,
    remove_temporaries,
    write_json,
)

LOCK = ".lock"
HOLDER = "running.json"  # who holds it; where there are locks, they decide
STALE_SECONDS = 120  # a holder on another host that keeps its file fresh counts as dead after this
# Errors of file systems without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_MARKS = ("config.json", LOCK, "checkpoints", "state.json")  # of a run or an experiment grid's cell
_ours: set[Path] = set()  # workdirs that this process holds


class Taken(UserError):
    """Another process holds the workdir."""


@contextlib.contextmanager
def hold(workdir: StrPath, doing: str) -> Iterator[None]:
    """Holds the workdir's write lock inside the block; creates the directory if needed.

    A workdir that this process holds already stays held by the outer block. A folder that was
    created here and is empty at the end is removed.

    Args:
      workdir: folder of a run.
      doing: what for, such as "training"; for the message that another process gets.

    Raises:
      Taken: another process holds it; the message names that process.
      UserError: the folder is not a workdir, or the disk is full or read-only.
    """
    try:
        with _hold(Path(workdir), doing):
            yield
    except Exception as error:
        if (converted := as_user_error(error)) is error:
            raise
        raise converted from error


@contextlib.contextmanager
def _hold(workdir: Path, doing: str) -> Iterator[None]:
    local(workdir, "--workdir")
    if workdir.resolve() in _ours:
        yield
        return
    made = not workdir.exists()
    refuse_foreign(workdir, _MARKS, "run")
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / LOCK, timeout=0)
    try:
        if not _acquire(lock):
            _warn(workdir)
    except filelock.Timeout:
        raise Taken(_taken(workdir)) from None
    try:
        _ours.add(workdir.resolve())
        remove_temporaries(workdir)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "doing": doing}
        write_json(workdir / HOLDER, who)
        yield
    finally:
        _ours.discard(workdir.resolve())
        (workdir / HOLDER).unlink(missing_ok=True)
        if made and {path.name for path in workdir.iterdir()} <= {LOCK}:
            (workdir / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process has started meanwhile
                workdir.rmdir()
        lock.release()


def _acquire(lock: filelock.FileLock) -> bool:
    """Takes a lock; False where the file system has none."""
    try:
        lock.acquire()
    except NotImplementedError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:  # such as a `filelock.Timeout`
            raise
        return False
    return True


def is_held(workdir: Path) -> bool:
    """Returns whether a process holds a workdir.

    Where the lock does not reach (another host, a file system without locks) the holder is alive
    if it has refreshed its `running.json` in the last `STALE_SECONDS`.
    """
    lock = filelock.FileLock(workdir / LOCK, timeout=0)
    try:
        locks = _acquire(lock)
    except filelock.Timeout:
        return True
    lock.release()
    if locks and _holder(workdir).get("host") == socket.gethostname():
        return False
    with contextlib.suppress(OSError):
        return time.time() - (workdir / HOLDER).stat().st_mtime < STALE_SECONDS
    return False


def _holder(workdir: Path) -> dict[str, Any]:
    """Contents of `running.json`; empty before its holder has written it."""
    return read_record(
        workdir / HOLDER,
        lambda who: {name: who[name] for name in ("pid", "host", "doing", "since")},
        missing={},
        damaged={},
    )


def _warn(workdir: Path) -> None:
    """Refuses a workdir without locks whose holder runs on this host; else warns."""
    who = _holder(workdir)
    if who and who["host"] == socket.gethostname() and who["pid"] != os.getpid():
        with contextlib.suppress(OSError, TypeError):
            os.kill(who["pid"], 0)
            raise Taken(_taken(workdir))
    warnings.warn(
        f"the file system of {workdir} has no locks: nothing keeps a second process from writing "
        "there, so do not start one",
        stacklevel=4,
    )


def _taken(workdir: Path) -> str:
    by = "another process writes to it"  # it has only just started
    if who := _holder(workdir):
        by = "process {pid} on {host} has been {doing} there since {since}".format(**who)
    return f"{workdir} is in use: {by}; wait until it has ended, or choose another --workdir"


def locked(workdir: StrPath, doing: str) -> contextlib.AbstractContextManager[None]:
    """Holds the workdir's lock in the first of several processes, for all of them."""
    from pgpsam_jax.distributed import multihost  # imports JAX, which holding a lock does not need

    return hold(workdir, doing) if multihost.is_first() else contextlib.nullcontext()
