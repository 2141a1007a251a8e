"""How a program ends: a sentence that says what is wrong, in which file, and what to do.

Exit codes: 2 for a mistake of the user, `AGAIN` where the same command goes on from what is saved.
"""

import contextlib
import errno
import os
import sys

AGAIN = 75  # EX_TEMPFAIL: a signal has stopped the program, which can be started again

_SPACE = "free some space, then start the same command again"
_PLACE = "make it accessible to this user, or choose another folder"
_FAULTS = {  # of the disk, not of the program
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EROFS: _PLACE,
    errno.EACCES: _PLACE,
    errno.EPERM: _PLACE,
    errno.ENOTDIR: "a part of this path is a file; choose another folder",
    errno.EEXIST: "a file of this name is in the way; choose another folder",
    errno.EIO: "the disk, or the network to it, has failed; start the same command again later",
}


class UserError(Exception):
    """Bad input, missing file or wrong setting; printed without a traceback, exit code 2."""


class Interrupted(KeyboardInterrupt):
    """A signal asks the program to end; printed without a traceback, exit code `AGAIN`.

    agreed: all processes of the run end here, having saved together.
    """

    def __init__(self, message: str, *, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


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
    """End with a sentence on stderr: `UserError` with code 2, `Interrupted` with `AGAIN`.

    Faults of the disk are told like a `UserError`; the rest passes.
    """
    try:
        yield
    except Interrupted as error:
        _end(AGAIN, f"stopped: {error}")
    except Exception as error:
        if not isinstance(told := explained(error), UserError):
            raise
        _end(2, f"error: {told}")


def _end(code: int, text: str):
    print(text, file=sys.stderr, flush=True)
    sys.exit(code)
