"""Safe reading of HDF5 datasets: no plugins, external links or decompression bombs."""

import contextlib
import itertools
import math
import zlib
from pathlib import Path

import numpy as np

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.io.array_checks import OpenArray, check_size, check_type
from pgpsam_jax.errors import UserError

_DEFLATE, _SHUFFLE, _CHECKSUM, _LZF = 1, 2, 3, 32000
_FILTERS = {_DEFLATE, _SHUFFLE, _CHECKSUM, _LZF}  # all built in
_PACKING = {_DEFLATE: 1032, _LZF: 88}  # most bytes that one stored byte can unpack to
_HARMLESS = 256 << 20  # bytes; chunks that cannot unpack to more need no check
_SLACK = 4096  # bytes of headers and checksums of a chunk


@contextlib.contextmanager
def opened(path: Path, key: str):
    """Opens a dataset as an `OpenArray`."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path} needs h5py: pip install 'pgpsam-jax[transunet]'") from None
    try:
        with h5py.File(path, "r", locking=False) as file:
            link = file.get(key, getlink=True)
            if link is None:
                held = ", ".join(sorted(file)[:5]) or "nothing"
                raise BadFile(f"{path} has no array {key!r} (it holds {held})", "key")
            dataset = file[key] if isinstance(link, h5py.HardLink) else None
            if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
                raise BadFile(f"{path} holds no plain array as {key!r}; save it again", "key")
            check_type(path, key, dataset.shape, dataset.dtype)
            _check_storage(path, dataset)
            yield OpenArray(dataset.shape, dataset.dtype, lambda: _read(path, dataset))
    except BadFile:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadFile(
            f"{path} is damaged or no HDF5 ({reason}); get a new copy", "damaged"
        ) from None


def _check_storage(path: Path, dataset) -> None:
    """Checks that all voxels are in this file and compressed by built-in filters."""
    filters = _filters(dataset)
    packers = sum(code in _PACKING for code in filters)
    if dataset.is_virtual or dataset.external or set(filters) - _FILTERS or packers > 1:
        raise BadFile(
            f"{path} keeps its voxels in other files or compressed by a plugin; save it again "
            "with gzip or without compression",
            "storage",
        )
    if dataset.chunks:
        check_size(path, dataset.chunks, dataset.dtype.itemsize)
        wanted = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        complete = dataset.id.get_num_chunks() == wanted
    else:
        complete = dataset.id.get_storage_size() >= dataset.size * dataset.dtype.itemsize
    if not complete:
        raise BadFile(
            f"{path} declares {dataset.shape} voxels but does not hold them all; get a new copy",
            "damaged",
        )


def _read(path: Path, dataset) -> np.ndarray:
    if dataset.chunks:
        _check_chunks(path, dataset)
    return dataset[()]


def _filters(dataset) -> list[int]:
    """Returns the codes of the filters applied when writing a chunk, in order."""
    plan = dataset.id.get_create_plist()
    return [plan.get_filter(index)[0] for index in range(plan.get_nfilters())]


def _check_chunks(path: Path, dataset) -> None:
    """Checks that no chunk unpacks to more than it declares; the library would not."""
    filters = _filters(dataset)
    plain = math.prod(dataset.chunks) * dataset.dtype.itemsize
    corners = [range(0, n, c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
    for corner in itertools.product(*corners):
        stored = dataset.id.get_chunk_info_by_coord(corner).size
        sound = stored <= plain + plain // 100 + _SLACK
        if sound and _LZF in filters:
            sound = stored * _PACKING[_LZF] <= _HARMLESS
        elif sound and _DEFLATE in filters and stored * _PACKING[_DEFLATE] > _HARMLESS:
            skipped, data = dataset.id.read_direct_chunk(corner)
            place = filters.index(_DEFLATE)
            sound = skipped >> place & 1 or _inflated(data, plain + _SLACK) <= plain + _SLACK
        if not sound:
            raise BadFile(
                f"{path} has a chunk at {corner} that unpacks to more than it declares, or may; "
                "save it again with gzip or without compression",
                "storage",
            )


def _inflated(data: bytes, limit: int) -> int:
    """Counts the bytes of a deflate stream, stopping a little above the limit."""
    stream, count = zlib.decompressobj(), 0
    try:
        while data and not stream.eof and count <= limit:
            count += len(stream.decompress(data, 1 << 20))
            data = stream.unconsumed_tail
    except zlib.error:
        return 0  # the library will refuse it
    return count
