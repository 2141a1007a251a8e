"""The first thing that a command does, before its imports take seconds; hence it has few itself."""

import os
import signal
import sys


def begin() -> None:
    """Ready this process for `python -m`: what may go wrong while the command's modules load.

    An interrupt ends it at once, as nothing can be lost yet, until the command listens itself.
    Names that the terminal's encoding lacks are printed in escaped form, which is no error.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if hasattr(sys.stdout, "reconfigure"):  # else it is closed, or replaced
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave(number, _) -> None:
    os.write(2, b"stopped: SIGINT came\n")
    os._exit(128 + number)
