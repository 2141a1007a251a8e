"""What an array in an untrusted file may be, checked before memory is taken."""

import math

import numpy as np

from pgpsam_jax.data.findings import BadFile

MAX_GIB = 2.0  # a 512 x 512 x 2048 volume in float32; more is taken for a broken header
_COPIES = 3  # the voxels as stored, scaled, and in display orientation
_allowed = MAX_GIB


def allow(gib: float) -> None:
    """Let this process, and the processes that it starts to work, read volumes of up to `gib`."""
    global _allowed
    _allowed = gib


def allowed() -> float:
    """GiB that a volume may have as float32."""
    return _allowed


def check_size(path, shape, itemsize: int = 4) -> None:
    """Refuse an array of the file `path` that would take more memory than is `allowed`."""
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
    """Refuse what is no plain array of numbers, or too large."""
    if dtype.kind not in "iufb" or dtype.itemsize > 8 or dtype.subdtype or dtype.names:
        raise BadFile(
            f"{path} holds {key} of type {dtype}; store plain integers or floats", "dtype"
        )
    check_size(path, shape, dtype.itemsize)
