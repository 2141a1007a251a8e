"""Feeds the train step: row indices into a device-resident set, or slices from the host."""

import jax
import numpy as np
from jax.sharding import Mesh

from pgpsam_jax.data.batch_sampler import Loader
from pgpsam_jax.distributed import multihost
from pgpsam_jax.sharding import device_mesh


class DeviceBatches:
    """Iterator of (batch, rows) over the few-shot set; for `batch` see `make_train_step`.

    Args:
      data: tree of (N, ...) host arrays, the same in all processes.
      loader: yields the rows (B,) of the global batch.
      mesh: the devices.
      resident_bytes: a set up to this size is copied to each device once, and batches hold row
        indices only; of a larger one, each process sends its devices their slices per batch.
    """

    def __init__(self, data: dict, loader: Loader, mesh: Mesh, resident_bytes: float):
        self._set, self.loader, self._mesh = data, loader, mesh
        self.resident = sum(array.nbytes for array in jax.tree.leaves(data)) <= resident_bytes
        if self.resident:
            self._set = multihost.put_global(self._set, device_mesh.replicated(mesh))

    def __iter__(self):
        return self

    def __next__(self):
        rows, sharding = next(self.loader), device_mesh.batch_sharding(self._mesh)
        if self.resident:
            return self._set | {"rows": multihost.put_global(rows, sharding)}, rows
        return jax.tree.map(lambda array: _select(array, rows, sharding), self._set), rows

    def abstract(self, batch_size: int) -> dict:
        """Returns shapes and shardings of a global batch of `batch_size`, to compile for."""
        sharding, shape = device_mesh.batch_sharding(self._mesh), (batch_size,)
        if self.resident:
            rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
            return jax.tree.map(lambda x: _like(x, x.shape, x.sharding), self._set) | {"rows": rows}
        return jax.tree.map(lambda x: _like(x, shape + x.shape[1:], sharding), self._set)


def _select(array, rows, sharding):
    """Rows of a host array, sharded over the batch axes."""
    shape = rows.shape + array.shape[1:]

    def part(index):
        return array[rows[index[0]]]

    return jax.make_array_from_callback(shape, sharding, part)


def _like(array, shape, sharding):
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)
