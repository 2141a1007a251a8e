"""The modes of files and folders, and a umask for a while."""

import contextlib
import os
import stat


@contextlib.contextmanager
def umask(mask):
    """What is written inside the block may not have these permissions."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder):
    """{"files" and "folders": the modes found in a folder and below}."""
    found = {"files": set(), "folders": set()}
    for place, folders, names in os.walk(folder):
        for kind, entries in (("files", names), ("folders", folders)):
            for name in entries:
                found[kind].add(stat.S_IMODE(os.stat(os.path.join(place, name)).st_mode))
    return found
