"""glibc malloc tuning for CPU training: keep freed memory, use huge pages.

Each step frees and reallocates its buffers. By default glibc returns large blocks to the system at
once, and the next step pays for each page again: with 4 KiB pages a fifth of a ViT-b step at 512 px
and a quarter of the step of `configs/phantom.py`; with 2 MiB pages, which the system must clear,
still a second of CPU time in a ViT-b step of two images.
"""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_NEVER = 1 << 40  # bytes from which blocks are returned to the system
_WANTED = {
    "glibc.malloc.hugetlb": 1,  # ask for pages of 2 MiB
    "glibc.malloc.mmap_threshold": _NEVER,
    "glibc.malloc.trim_threshold": _NEVER,
    "glibc.malloc.arena_max": 1,  # threads reuse each other's freed memory
}


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, in huge pages. Call it first in a program.

    glibc reads these settings from an environment variable at process start, so this re-executes
    the program with the same arguments, files and process id. Existing settings are kept.
    """
    if not sys.platform.startswith("linux"):
        return
    settings = os.environ.get(_VARIABLE, "")
    missing = [f"{name}={value}" for name, value in _WANTED.items() if name not in settings]
    if missing:
        os.environ[_VARIABLE] = ":".join(filter(None, [settings, *missing]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
