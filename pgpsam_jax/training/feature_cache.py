"""The few-shot set as a frozen encoder sees it, encoded once instead of in every step.

With augmentation, every slice is encoded in several augmented copies, which epochs take in turn.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pgpsam_jax.data.augmentation.augment import augment, sample_keys
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.segmenter import to_input
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training import from_config


def encoded_set(
    config: ConfigDict, mesh: Mesh, model, images: np.ndarray, labels: np.ndarray, *, seed: int
) -> dict:
    """What `step.make_train_step` takes with `train.encoded_copies`: `encoded` and `label`.

    Leaves are (copies * N, ...) arrays of the host, all copies of the set one after the other.
    model: (graphdef, params, frozen). images (N, S, S) in [0, 1], labels (N, S, S) class ids; seed:
    of augmentation.
    """
    copies, count = config.train.encoded_copies, len(images)
    lanes = mesh.shape["data"] * mesh.shape["fsdp"]
    size = math.ceil(config.eval.batch_size / lanes) * lanes
    settings, rows = from_config.step_config(config).augment, device_mesh.batch_sharding(mesh)
    graphdef, *states = model

    def encode(states, images, labels, copy, places):
        keys = sample_keys(jax.random.key(seed), copy, places)
        images, labels = augment(keys, images.astype(wide(images.dtype)), labels, settings)
        return nnx.merge(graphdef, *states).encode(to_input(images)), labels.astype(jnp.uint8)

    run = jax.jit(device_mesh.over_mesh(encode, mesh), out_shardings=rows)
    parts = []
    for copy in range(copies):
        for start in range(0, count, size):
            # The last batch is filled up with its last slice, which is then left out again.
            places = np.minimum(np.arange(start, start + size), count - 1)
            batch = multihost.place((images[places], labels[places], places.astype(np.int32)), rows)
            found = run(states, *batch[:2], np.int32(copy), batch[2])
            kept = min(size, count - start)
            parts.append(jax.tree.map(lambda x, n=kept: _host(x)[:n], found))
    encoded, labels = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves((encoded, labels))) / 2**30
    if taken > config.data.resident_gib:
        raise UserError(
            f"{copies} encoded copies of {count} slices take {taken:.1f} GiB of every device, more "
            f"than data.resident_gib ({config.data.resident_gib:g}); raise that, or lower "
            "train.encoded_copies"
        )
    return {"encoded": encoded, "label": labels}


def _host(array) -> np.ndarray:
    return np.asarray(multihost.whole(array))
