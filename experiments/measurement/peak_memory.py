"""Peak resident memory of this process, from Linux's resettable high-water mark."""

import contextlib
import ctypes
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_resident() -> int | None:
    """Returns the peak in bytes since the start or `forget_peak`; None without /proc."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else None


def forget_peak() -> None:
    """Returns free memory to the system and resets the mark, where the system allows it."""
    if sys.platform.startswith("linux"):
        # Else the process keeps what the compiler freed (`runtime/malloc.py`).
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
