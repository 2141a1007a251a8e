"""Errors a user can cause: one sentence that says what is wrong, in which file, and what to do."""

import contextlib
import sys


class UserError(Exception):
    """Bad input, missing file or wrong setting; printed without a traceback, exit code 2."""


@contextlib.contextmanager
def exit_on_user_error():
    """Turn a `UserError` into `error: <message>` on stderr and exit code 2; the rest passes."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
