"""One process at a time writes to a workdir; the lock goes with it, however it dies."""

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from pathlib import Path

import filelock

from pgpsam_jax.checkpointing import (
    workdir_lock,
)
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError, explained
from pgpsam_jax.utils.files import local, refuse_foreign, remove_temporaries, write_json

LOCK = ".lock"
HOLDER = "running.json"  # who holds it: for the sentence only, the lock decides where there are any
# What file systems without locks answer.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_MARKS = ("config.json", LOCK, "checkpoints", "state.json")  # of a run, or of a cell of a grid


@contextlib.contextmanager
def held(workdir, doing: str):
    """Be the one that writes to a workdir inside the block; it is made if it is not there.

    doing: "training", for example. Raises a `UserError` that says who holds it; what a full or
    read-only disk raises inside becomes one too. A folder made here and left empty is removed.
    """
    try:
        with _held(Path(workdir), doing):
            yield
    except Exception as error:
        if (told := explained(error)) is error:
            raise
        raise told from error


@contextlib.contextmanager
def _held(workdir: Path, doing: str):
    local(workdir, "--workdir")
    made = not workdir.exists()
    refuse_foreign(workdir, _MARKS, "run")
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(_taken(workdir)) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        _warn(workdir)
    try:
        remove_temporaries(workdir)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "doing": doing}
        write_json(workdir / HOLDER, who)
        yield
    finally:
        (workdir / HOLDER).unlink(missing_ok=True)
        if made and {path.name for path in workdir.iterdir()} <= {LOCK}:
            (workdir / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process has come meanwhile
                workdir.rmdir()
        lock.release()


def _warn(workdir: Path) -> None:
    """Without a lock only what its holder wrote tells, and only of this host."""
    try:
        who = json.loads((workdir / HOLDER).read_text(encoding="utf-8"))
        if who["host"] == socket.gethostname() and who["pid"] != os.getpid():
            os.kill(who["pid"], 0)
            raise UserError(_taken(workdir))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    warnings.warn(
        f"the file system of {workdir} has no locks: nothing keeps a second process from writing "
        "there, so start none",
        stacklevel=4,
    )


def _taken(workdir: Path) -> str:
    try:
        who = json.loads((workdir / HOLDER).read_text(encoding="utf-8"))
        by = "process {pid} on {host} has been {doing} there since {since}".format(**who)
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        by = "another process writes to it"
    return f"{workdir} is in use: {by}; wait until that has ended, or choose another --workdir"


def locked(workdir, doing: str):
    """The workdir's lock, which the first of several processes holds for all."""
    return workdir_lock.held(workdir, doing) if multihost.is_first() else contextlib.nullcontext()
