"""Mesh and shardings: a (data, fsdp, tensor) mesh and one table of regex -> PartitionSpec.

The batch is split over `data` and `fsdp`. Large kernels are split over `fsdp` along their input
and over `tensor` along the axis that Megatron-style parallelism splits; the rest is replicated.
Model code knows nothing of this: specs are found by parameter path.
"""

import functools
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.placement import Placement, traced_for

AXES = ("data", "fsdp", "tensor")
P = PartitionSpec

# First match wins; a path that no row matches is replicated. Optimiser moments carry their
# parameter's path and so its sharding.
RULES = (
    (r"attn/qkv/kernel$", P("fsdp", "tensor")),
    (r"(attn/proj|out_proj|mlp/lin2)/kernel$", P("tensor", "fsdp")),
    (r"(mlp/lin1|[qkv]_proj)/kernel$", P("fsdp", "tensor")),
    (r"patch_embed/kernel$", P(None, None, None, "fsdp")),
    (r"neck/conv[12]/kernel$", P(None, None, "fsdp", None)),
    (r"(projection|fuse|join)/kernel$", P("fsdp", None)),
    (r"upscaling/conv[12]/kernel$", P("fsdp", None, None, None)),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Mesh over all devices; one size may be -1, "the rest". Sizes that do not fit are refused."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    unknown = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if (
        len(unknown) > 1
        or known < 1
        or len(devices) % known
        or (not unknown and known != len(devices))
    ):
        raise UserError(
            f"config.mesh (data={data}, fsdp={fsdp}, tensor={tensor}) does not fit "
            f"{len(devices)} devices; the product must be {len(devices)}, with at most one -1"
        )
    for name in unknown:
        sizes[name] = len(devices) // known
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of a parameter path; an axis that does not divide its dimension is left out."""
    for pattern, spec in RULES:
        if re.search(pattern, path) and len(spec) == len(shape):
            fits = [
                axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=True)
            ]
            return P(*fits)
    return P()


def state_shardings(tree, mesh: Mesh):
    """NamedSharding for every leaf of a tree of states (arrays or shapes), by its path."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's rows of the global batch to global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def over_mesh(function, mesh: Mesh):
    """A step as it is to be jitted for the mesh: its attention suits the devices and is split."""
    placement = Placement.of(
        mesh.devices.flat[0], mesh=mesh, batch_axes=("data", "fsdp"), head_axes=("tensor",)
    )

    @functools.wraps(function)
    def step(*args):
        with traced_for(placement):
            return function(*args)

    return step
