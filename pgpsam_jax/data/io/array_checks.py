"""Size and dtype limits of arrays in untrusted files, checked before memory is allocated."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pgpsam_jax.data.findings import BadFile

MAX_GIB = 2.0  # a 512 x 512 x 2048 volume in float32; anything larger suggests a broken header
_COPIES = 3  # the voxels as stored, scaled, and in display orientation
_allowed = MAX_GIB


class OpenArray(NamedTuple):
    """An array in an open file, within the limits, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def allow(gib: float) -> None:
    """Sets the largest volume, as float32, that this process reads."""
    global _allowed
    _allowed = gib


def worker_initializer() -> Callable[[], None]:
    """Returns a function that sets the limit of this process in a worker process."""
    return functools.partial(allow, _allowed)


def check_size(path, shape, itemsize: int = 4) -> None:
    """Raises `BadFile` if an array of the file `path` exceeds the limit."""
    need = math.prod(int(n) for n in shape) * max(itemsize, 4) / 2**30
    if need > _allowed:
        wanted = math.ceil(need)
        raise BadFile(
            f"{path} declares {' x '.join(map(str, shape))} voxels, {need:.1f} GiB in memory, over "
            f"the limit of {_allowed:g} GiB; check its header, crop it, or set data.max_gib "
            f"(--max-gib of predict and verify) to {wanted}, which takes {_COPIES * wanted} GiB of "
            "memory",
            "size",
        )


def check_type(path, key: str, shape, dtype: np.dtype) -> None:
    """Raises `BadFile` unless the array is a plain one of numbers and within the limit."""
    if dtype.kind not in "iufb" or dtype.itemsize > 8 or dtype.subdtype or dtype.names:
        raise BadFile(
            f"{path} holds {key} of type {dtype}; store plain integers or floats", "dtype"
        )
    check_size(path, shape, dtype.itemsize)
