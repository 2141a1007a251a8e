"""The device mesh (data, fsdp, tensor) and the shardings of batches and states on it.

The batch is split over `data` and `fsdp`. Large weights, optimizer moments and the frozen base are
stored in parts over `fsdp` and `tensor` (`rules`) and gathered over `fsdp` when a layer uses them
(`context`). `tensor` splits heads and hidden channels of the image encoder; each device of `tensor`
repeats the decoder, which is small beside it. Model code names no mesh axis.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgpsam_jax.errors import UserError
from pgpsam_jax.sharding.context import TracingContext, traced_for
from pgpsam_jax.sharding.rules import AXES, BATCH, PARTS, spec_of


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh over all devices; one size may be -1, "the rest". Sizes that do not fit are refused."""
    devices = jax.devices() if devices is None else devices
    sizes, count = {"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices)
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    fits = known >= 1 and count % known == 0 and (len(unknown) == 1 or known == count)
    if len(unknown) > 1 or min(sizes.values()) < -1 or not fits:
        raise UserError(
            f"config.mesh (data={data}, fsdp={fsdp}, tensor={tensor}) does not fit {count} "
            f"devices; the product must be {count}: choose each from {_listed(_divisors(count))}, "
            "or -1 for at most one of them, the rest"
        )
    for name in unknown:
        sizes[name] = count // known
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check(mesh: Mesh, encoder: str, heads: int, width: int, batch: int) -> None:
    """Checks that a model divides over a mesh.

    Args:
      encoder: its name, for messages.
      heads, width: of its attention; over `tensor` and over `fsdp` x `tensor`.
      batch: rows of the global batch; over `data` x `fsdp`.

    Raises:
      UserError: names the sizes that do.
    """
    data, fsdp, tensor = (mesh.shape[name] for name in AXES)
    tensors = [n for n in _divisors(mesh.size) if heads % n == 0]
    if tensor not in tensors:
        raise UserError(
            f"config.mesh.tensor is {tensor}, but the {heads} heads of {encoder} "
            f"and {mesh.size} devices divide over {_listed(tensors)} only; choose one of these"
        )
    if width % (fsdp * tensor):
        choices = [n for n in _divisors(mesh.size // tensor) if width % (n * tensor) == 0]
        raise UserError(
            f"config.mesh.fsdp is {fsdp}, but the width {width} of {encoder} does "
            f"not divide over fsdp x tensor = {fsdp * tensor}; choose fsdp from {_listed(choices)}"
        )
    lanes = data * fsdp
    if batch % lanes:
        choices = [n for n in tensors if batch % (mesh.size // n) == 0]
        other = f", or config.mesh.tensor {_listed(choices)}" if choices else ""
        raise UserError(
            f"train.batch_size {batch} does not divide over the {lanes} devices of data x fsdp; "
            f"choose a multiple of {lanes}{other}"
        )


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _listed(numbers: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))


def state_shardings(tree: Any, mesh: Mesh, method: tuple[str, str] | None = None) -> Any:
    """NamedSharding for every leaf of a tree of states (arrays or shapes), by its path.

    method: see `spec_of`; None for a part of SAM by itself.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return NamedSharding(mesh, spec_of(method, name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of the global batch to global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


@contextlib.contextmanager
def traced_on(mesh: Mesh) -> Iterator[None]:
    """Functions traced inside are for this mesh: its kernels, its constraints on activations.

    Also decorates a function that is to be jitted: `jax.jit(traced_on(mesh)(step))`.
    """
    placement = TracingContext.of(
        mesh.devices.flat[0],
        mesh=mesh,
        batch_axes=BATCH,
        head_axes=("tensor",),
        weight_axes=PARTS,
    )
    with traced_for(placement):
        yield
