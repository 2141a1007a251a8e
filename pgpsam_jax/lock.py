"""One process at a time writes to a workdir; the lock goes with it, however it dies."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import filelock

from pgpsam_jax.errors import UserError, explained
from pgpsam_jax.files import remove_temporaries, write_json

LOCK = ".lock"
HOLDER = "running.json"  # who holds it: for the sentence only, the lock decides


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
    made = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(_taken(workdir)) from None
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


def _taken(workdir: Path) -> str:
    try:
        who = json.loads((workdir / HOLDER).read_text(encoding="utf-8"))
        by = "process {pid} on {host} has been {doing} there since {since}".format(**who)
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        by = "another process writes to it"
    return f"{workdir} is in use: {by}; wait until that has ended, or choose another --workdir"
