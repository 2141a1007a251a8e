"""How a program ends: a sentence that says what is wrong, in which file, and what to do.

Exit codes: 2 for a mistake of the user, `AGAIN` where the same command goes on from what is saved,
128 and the number of the signal that ended any other command, as shells have it (130: Ctrl-C).
"""

import contextlib
import errno
import os
import signal
import sys

AGAIN = 75  # EX_TEMPFAIL: a signal has stopped the program, which can be started again
SIGNALED = 128  # and the signal's number
NO_READER = SIGNALED + getattr(signal, "SIGPIPE", 13)

_SPACE = "free some space, then start the same command again"
_PLACE = "make it accessible to this user, or choose another folder"
_NETWORK = "the disk, or the network to it, has failed; start the same command again later"
_FAULTS = {  # of the disk, not of the program
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EROFS: _PLACE,
    errno.EACCES: _PLACE,
    errno.EPERM: _PLACE,
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
    """A signal asks the program to end; printed without a traceback.

    agreed: all processes of the run end here, having saved together. code: the exit code.
    """

    def __init__(self, message: str, *, agreed: bool = False, code: int = AGAIN):
        super().__init__(message)
        self.agreed, self.code = agreed, code


def explained(error: BaseException) -> BaseException:
    """A `UserError` in place of what a full, failing or read-only disk raises; else the error.

    Libraries that write by themselves tell such a fault in the text of errors of their own.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code in _FAULTS:
        what = error.filename or "a file cannot be written"
        return UserError(f"{what}: {os.strerror(code)}; {_FAULTS[code]}")
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        if not isinstance(error, UserError | OSError) and os.strerror(code) in str(error):
            return UserError(f"a file cannot be written: {os.strerror(code)}; {_FAULTS[code]}")
    return error


@contextlib.contextmanager
def exit_on_user_error():
    """End with a sentence on stderr: `UserError` with code 2, `Interrupted` with its own.

    Faults of the disk are told like a `UserError`; where whoever read the output has left (`head`),
    nothing is; the rest passes.
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
        if not isinstance(told := explained(error), UserError):
            raise
        _end(2, f"error: {told}")


def _end(code: int, text: str):
    try:
        sys.stdout.flush()
    except (AttributeError, OSError):  # closed, or what cannot be written is the output itself
        _silence()
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def _silence() -> None:
    """Output that nobody can take goes nowhere; Python would complain of it at its end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
