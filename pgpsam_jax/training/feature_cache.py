"""Features of the few-shot set from a frozen encoder, computed once instead of in each step.

With augmentation, each slice is encoded in several augmented copies that epochs use in turn.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from pgpsam_jax.data.augmentation.augment import augment, sample_keys
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.train_step import StepConfig


def encode_few_shot_set(
    step: StepConfig,
    mesh: Mesh,
    model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    batch_size: int = 8,
    resident_gib: float = math.inf,
) -> dict:
    """Encodes the few-shot set for `train_step.make_train_step`: `encoded` and `label`.

    Args:
      step: settings; `encoded` copies of each slice, augmented by `augment`.
      model: (graphdef, params, frozen).
      images: (N, S, S) in [0, 1].
      labels: (N, S, S) class ids.
      seed: of augmentation.
      batch_size: slices encoded at a time.
      resident_gib: GiB that the set may take on each device.

    Returns:
      (copies * N, ...) host arrays, one copy of the set after the other.

    Raises:
      UserError: the set is larger than `resident_gib`.
    """
    copies, count = step.encoded, len(images)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    size = math.ceil(batch_size / shards) * shards
    settings, rows = step.augment, device_mesh.batch_sharding(mesh)
    graphdef, *states = model

    def encode(states, images, labels, copy, indices):
        keys = sample_keys(jax.random.key(seed), copy, indices)
        images, labels = augment(keys, images.astype(wide(images.dtype)), labels, settings)
        return nnx.merge(graphdef, *states).encode(to_input(images)), labels.astype(jnp.uint8)

    shapes = jax.eval_shape(
        encode, states, images[:1], labels[:1], np.int32(0), np.zeros(1, np.int32)
    )
    leaves = jax.tree.leaves(shapes)
    taken = copies * count * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**30
    if taken > resident_gib:
        raise UserError(
            f"{copies} encoded copies of {count} slices take {taken:.1f} GiB on each device, more "
            f"than data.resident_gib ({resident_gib:g}); raise it, or lower train.encoded_copies"
        )
    kept = jax.tree.map(lambda x: np.empty((copies * count, *x.shape[1:]), x.dtype), shapes)
    run = jax.jit(device_mesh.traced_on(mesh)(encode), out_shardings=rows)
    silent = not multihost.is_first()
    with tqdm(total=copies * count, desc="encoding", unit="slice", disable=silent) as progress:
        for copy, start in itertools.product(range(copies), range(0, count, size)):
            # The last batch is padded with its last slice; the padding is dropped below.
            indices = np.minimum(np.arange(start, start + size), count - 1)
            batch = multihost.put_global(
                (images[indices], labels[indices], indices.astype(np.int32)), rows
            )
            found = run(states, *batch[:2], np.int32(copy), batch[2])
            end = min(start + size, count)
            for target, part in zip(jax.tree.leaves(kept), jax.tree.leaves(found), strict=True):
                target[copy * count + start : copy * count + end] = _host(part)[: end - start]
            progress.update(end - start)
    return dict(zip(("encoded", "label"), kept, strict=True))


def _host(array) -> np.ndarray:
    return np.asarray(multihost.all_gather(array))
