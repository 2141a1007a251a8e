"""Memory of the process as a training step on CPU wants it: kept when freed, and in large pages.

A step frees and takes its buffers anew. glibc gives large blocks back to the system at once, and
the next step pays for every page of 4 KiB again: 32,000 page faults and a quarter of the step of
`configs/phantom.py` (0.217 s with them, 0.166 s without, two cores), 315,000 faults and a fifth of
a ViT-b step at 512 px, whose buffers are larger than what can be kept.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_TUNABLES, _HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def keep_freed_memory() -> None:
    """Tell glibc to keep blocks up to 1 GiB for reuse and to ask for pages of 2 MiB.

    Call it first in a program: glibc reads of pages only when a process starts, so that the
    program is started again in its place, with the same arguments, files and process id.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library: nothing to tell
        return
    tunables = os.environ.get(_TUNABLES, "")
    if _HUGE not in tunables:
        os.environ[_TUNABLES] = ":".join(filter(None, (tunables, f"{_HUGE}=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
