"""What an array in an untrusted file may be, checked before memory is taken."""

import math

import numpy as np

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.data.nifti import MAX_BYTES


def check_size(path, shape, itemsize: int = 4) -> None:
    """Refuse an array of the file `path` that would take more than `nifti.MAX_BYTES`."""
    need = math.prod(shape) * max(itemsize, 4)
    if need > MAX_BYTES:
        raise BadFile(
            f"{path} declares an array of {need / 2**30:.1f} GiB in memory, over the limit of "
            f"{MAX_BYTES / 2**30:.0f} GiB; check the file or crop it",
            "size",
        )


def check_type(path, key: str, shape, dtype: np.dtype) -> None:
    """Refuse what is no plain array of numbers, or too large."""
    if dtype.kind not in "iufb" or dtype.itemsize > 8 or dtype.subdtype or dtype.names:
        raise BadFile(
            f"{path} holds {key} of type {dtype}; store plain integers or floats", "dtype"
        )
    check_size(path, shape, dtype.itemsize)
