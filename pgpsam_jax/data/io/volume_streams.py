"""Opens volume files: plain, gzip, or the two files of a pair."""

import contextlib
import gzip
import io
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.io.volume_files import check_entry, halves

_CHUNK = 16 << 20  # bytes
_PIECE = 16 << 10  # compressed bytes read at a time
# Python 3.12 and newer refill a larger buffer at each member of a gzip, and copy it: a file of
# empty members took seven times as long as on 3.11.
_UNFILLED = getattr(gzip, "READ_BUFFER_SIZE", _PIECE) - _PIECE


class _ShortReads(io.BufferedReader):
    """Fills no more than a piece of the buffer of `gzip`."""

    def read(self, size=-1):
        return super().read(max(size - _UNFILLED, 1) if size > _PIECE else size)


class Opened(NamedTuple):
    """Streams of header and voxels, which are the same unless the file is a pair."""

    header: io.BufferedIOBase
    voxels: io.BufferedIOBase
    zipped: bool
    size: int  # bytes of the file with the voxels

    @property
    def paired(self) -> bool:
        return self.header is not self.voxels


@contextlib.contextmanager
def opened(path: Path):
    """Opens the file, or both files of a pair."""
    with reading_errors(path), contextlib.ExitStack() as stack:
        streams: list[io.BufferedIOBase] = []
        for half in halves(path):
            check_entry(half)
            file = stack.enter_context(open(half, "rb"))
            zipped = _is_gzip(file, half)
            streams.append(gzip.GzipFile(fileobj=_ShortReads(file)) if zipped else file)
        yield Opened(streams[0], streams[-1], zipped, half.stat().st_size)


def read_numbers(stream, count: int, dtype) -> tuple[np.ndarray, int]:
    """Reads an array (count,), as far as the stream goes, and returns it with the bytes read."""
    array = np.empty(count, dtype)
    view, done = array.view(np.uint8).data, 0
    while read := stream.readinto(view[done : done + _CHUNK]):
        done += read
    return array, done


def _is_gzip(file, path: Path) -> bool:
    """Whether a file is gzip; raises `BadFile` if its name says otherwise."""
    named = path.name.lower().endswith(".gz")
    zipped = file.peek(2)[:2] == b"\x1f\x8b"
    if named and not zipped:
        raise BadFile(f"{path} is named .gz but is not gzip; rename it or compress it", "name")
    if zipped and not named:
        raise BadFile(f"{path} is gzip but is not named .gz; rename it to {path.name}.gz", "name")
    return zipped


@contextlib.contextmanager
def reading_errors(path: Path):
    """Converts errors of reading a file to `BadFile`."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFile(
            f"{path} is damaged or cut off ({error}); get a new copy", "damaged"
        ) from error
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}", "unreadable") from error
    except MemoryError as error:
        raise BadFile(
            f"{path} does not fit into memory; crop it, or use a larger machine", "size"
        ) from error
