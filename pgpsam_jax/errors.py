"""User-facing errors and exit codes: one sentence with the fault, the file and the remedy.

Exit codes: 2 for user errors; `AGAIN` if the same command resumes the work; 128 plus the signal's
number for other commands ended by a signal, as in shells (130: Ctrl-C).
"""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

AGAIN = 75  # EX_TEMPFAIL: stopped by a signal; the same command resumes
SIGNALED = 128  # plus the signal's number
NO_READER = SIGNALED + getattr(signal, "SIGPIPE", 13)

_SPACE = "free some space, then start the same command again"
_ACCESS = "make it accessible to this user, or choose another folder"
_NETWORK = "the disk, or the network to it, has failed; start the same command again later"
_FAULTS = {  # of the disk, not of the program: errno -> remedy
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EROFS: _ACCESS,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.ENOTDIR: "a part of this path is a file; choose another folder",
    errno.EEXIST: "a file of this name is in the way; choose another folder",
    errno.ENOENT: "check the path",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads to itself; choose another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: _NETWORK,
    errno.ESTALE: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
}


class UserError(Exception):
    """Bad input, missing file or wrong setting; printed without a traceback, exit code 2."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop; printed without a traceback.

    Attributes:
      agreed: all processes of the run stop here, after saving together.
      code: the exit code.
    """

    def __init__(self, message: str, *, agreed: bool = False, code: int = AGAIN):
        super().__init__(message)
        self.agreed, self.code = agreed, code


def as_user_error(error: BaseException) -> BaseException:
    """Converts the error of a full, failing or read-only disk to a `UserError`.

    Other errors are returned unchanged. Libraries that write files may name such a fault only in
    the text of their own errors.
    """
    if isinstance(error, OSError) and error.errno in _FAULTS:
        what = error.filename or "a file cannot be written"
        return UserError(f"{what}: {os.strerror(error.errno)}; {_FAULTS[error.errno]}")
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        if not isinstance(error, UserError | OSError) and os.strerror(code) in str(error):
            return UserError(f"a file cannot be written: {os.strerror(code)}; {_FAULTS[code]}")
    return error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exits with one sentence on stderr: code 2 for `UserError`, its own for `Interrupted`.

    Disk faults are reported as `UserError`. A closed output pipe (`head`) ends the program
    silently. All other exceptions pass through.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed
                sys.stdout.flush()
    except Interrupted as error:
        _end(error.code, f"stopped: {error}")
    except KeyboardInterrupt:
        _end(SIGNALED + signal.SIGINT, "stopped: SIGINT received")
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        _silence()
        sys.exit(NO_READER)
    except Exception as error:
        if not isinstance(converted := as_user_error(error), UserError):
            raise
        _end(2, f"error: {converted}")


def _end(code: int, text: str) -> NoReturn:
    try:
        sys.stdout.flush()
    except (AttributeError, OSError):  # stdout is closed or cannot be written
        _silence()
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def _silence() -> None:
    """Redirects stdout to the null device; else Python would complain at exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
