"""Memory of the process as a training step on CPU wants it: kept when freed, and in large pages.

A step frees and takes its buffers anew. glibc gives large blocks back to the system at once, and
the next step pays for every page again: with pages of 4 KiB a fifth of a ViT-b step at 512 px and
a quarter of the step of `configs/phantom.py`; with pages of 2 MiB, which the system must clear,
still a second of CPU time in a ViT-b step of two images. Blocks that are kept cost neither.
"""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_NEVER = 1 << 40  # bytes: from this size on blocks are given back
_WANTED = {
    "glibc.malloc.hugetlb": 1,  # ask for pages of 2 MiB
    "glibc.malloc.mmap_threshold": _NEVER,
    "glibc.malloc.trim_threshold": _NEVER,
    "glibc.malloc.arena_max": 1,  # what one thread freed serves the next
}


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for reuse, in large pages. Call it first in a program.

    glibc is told by an environment variable that it reads when a process starts, so the program is
    started again in its place, with the same arguments, files and process id. Settings that the
    variable already has stay as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    settings = os.environ.get(_VARIABLE, "")
    missing = [f"{name}={value}" for name, value in _WANTED.items() if name not in settings]
    if missing:
        os.environ[_VARIABLE] = ":".join(filter(None, [settings, *missing]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
