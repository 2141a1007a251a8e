"""Training steps compiled for TPUs that are not there: memory and FLOPs of a chip, never time.

The compiler comes with libtpu, which needs no TPU: pip install '.[tpu]'. A topology is named by
its chip and its shape in chips, `v5p:8x8x8`; Cloud TPU calls that slice v5p-1024, since it counts
the cores of v4 and v5p, of which a chip has two, and the chips of v5e and v6e.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.sharded_step import shard_step

_COUNTED_BY_CORE = ("v4", "v5p")


@dataclasses.dataclass(frozen=True)
class CompiledCost:
    """Of one chip, bytes: what it is given, what it needs besides, what it returns.

    aliased: outputs that take the place of arguments. flops leave out those of hand-written
    kernels; accessed: bytes that operations read and write. A loop's body counts once in both;
    None where the compiler keeps no count.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    flops: float | None
    accessed: float | None

    @property
    def total(self) -> int:
        """Bytes the step needs at once."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """(chip, shape) of `v5e:4x8`."""
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)*)", name)
    if not match:
        raise UserError(f"topology {name!r} is no chip and shape, write it as in v5e:2x2")
    return match[1], tuple(map(int, match[2].split("x")))


def slice_name(name: str) -> str:
    """What Cloud TPU calls a topology: `v5p-1024` for `v5p:8x8x8`."""
    chip, shape = parse_topology(name)
    return f"{chip}-{math.prod(shape) * (2 if chip in _COUNTED_BY_CORE else 1)}"


def links(name: str, coordinates) -> int:
    """Links over which each chip of a group receives at once, by the chips' coordinates.

    Two along a side of the slice that the group spans and that closes to a ring, one along any
    other side that it extends over. v5e and v6e close sides of 16, v4 and v5p those of slices made
    of whole 4x4x4 cubes.
    """
    chip, shape = parse_topology(name)
    cubes = len(shape) == 3 and all(side % 4 == 0 for side in shape)
    count = 0
    for side, places in zip(shape, zip(*coordinates, strict=True), strict=False):
        extent = len(set(places))
        closed = cubes if chip in _COUNTED_BY_CORE else side == 16
        count += 0 if extent == 1 else 2 if closed and extent == side else 1
    return count


def topology_devices(name: str) -> list:
    """The chips of a TPU topology such as `v5e:2x2` or `v6e:4x4`, only to be compiled for."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology {name!r} needs libtpu's compiler; pip install '.[tpu]'")
    # No chip is held, so processes need not wait for one another, nor ask a cloud who they are.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Both cores of a v4 chip as one device, as JAX runs there; by default it would be two.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"no TPU topology {name!r} ({str(error).splitlines()[0]}); name chip and shape as in "
            "v5e:2x2"
        ) from None


def abstract_model(settings: ConfigDict, num_classes: int, mesh):
    """(graphdef, params, frozen) of a configuration as it is for the mesh, shapes only."""
    with device_mesh.traced_on(mesh):
        return build.abstract_model(settings, num_classes)


def lower_step(
    plan: TrainingPlan, mesh, model, image_size: int, slices: int = 126, seed: int = 0
) -> jax.stages.Lowered:
    """The training step of an `abstract_model` on a mesh whose devices need not exist, traced.

    slices: of the few-shot set. Batches come from the host: float16 images, uint8 labels.
    """
    lanes, size = device_mesh.batch_sharding(mesh), image_size
    batch = {
        name: jax.ShapeDtypeStruct((plan.batch_size, size, size), dtype, sharding=lanes)
        for name, dtype in (("image", np.float16), ("label", np.uint8))
    }
    return shard_step(plan, mesh, *model, batch, epoch_size=slices, seed=seed).lower()


def compile_step(
    settings: ConfigDict, plan: TrainingPlan, num_classes: int, mesh
) -> jax.stages.Compiled:
    """The training step of a configuration for the mesh."""
    model = abstract_model(settings, num_classes, mesh)
    return lower_step(plan, mesh, model, settings.image_size).compile()


def compiled_cost(compiled: jax.stages.Compiled) -> CompiledCost:
    """What the compiler plans for one chip."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return CompiledCost(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        cost.get("flops"),
        cost.get("bytes accessed"),
    )
