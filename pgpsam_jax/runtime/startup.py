"""First step of a command, before its slow imports; imports little itself."""

import os
import signal
import sys


def begin() -> None:
    """Prepares this process for `python -m` while the modules of the command load.

    An interrupt exits at once, as nothing can be lost yet, until the command installs its own
    handlers. Characters that the terminal cannot encode are printed escaped.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if hasattr(sys.stdout, "reconfigure"):  # not closed or replaced
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave(number, _) -> None:
    os.write(2, b"stopped: SIGINT came\n")
    os._exit(128 + number)
