"""Shuffled, resumable batch indices (grain).

A few-shot set is a fraction of a gigabyte and stays in memory (see `device_batches`), so only row
numbers are drawn here, without worker processes or threads. The batch of a step depends only on
(seed, step, N, batch size): each process of a run draws all rows, and uses those of its devices, so
the data do not depend on the number of processes or the mesh.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from pgpsam_jax.errors import UserError


class Loader(Iterator[np.ndarray], Protocol):
    """An endless iterator over batches, (B,) int32 rows, whose position can be saved."""

    def get_state(self) -> dict: ...

    def set_state(self, state: dict) -> None: ...

    def close(self) -> None: ...


def make_loader(count: int, *, batch_size: int, seed: int) -> Loader:
    """Returns a loader of rows from 0 to `count` - 1.

    Each epoch is a new permutation and batches cross epochs, so no row is dropped and `count` may
    be smaller than `batch_size`.
    """
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, which nothing else uses
    if count < 1:
        raise ValueError(f"a set of {count} slices has no batches")
    if batch_size < 1:
        raise UserError(f"train.batch_size is {batch_size}; give 1 or more")
    dataset = grain.MapDataset.source(_Order(count, seed)).batch(batch_size, drop_remainder=True)
    dataset = dataset.map(lambda rows: np.asarray(rows).astype(np.int32))
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(dataset.to_iter_dataset(options))


class _Order:
    """Maps a position in an endless sequence of epochs to a row, with a permutation per epoch.

    Replaces grain's shuffle, which iterates a 16-bit cipher until the result is below `count`:
    1.7 ms per index for 17 slices, 10 ms for 3.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._rows = -1, np.empty(0, int)

    def __len__(self) -> int:
        return 1 << 62  # practically endless, and fits a machine word

    def __getitem__(self, position: int) -> np.int64:
        epoch, place = divmod(int(position), self.count)
        if epoch != self._epoch:
            self._rows = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epoch = epoch
        return self._rows[place]

    def __repr__(self) -> str:
        return f"epochs of {self.count} rows, seed {self.seed}"
