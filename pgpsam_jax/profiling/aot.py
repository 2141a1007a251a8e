"""Compiles train steps ahead of time for absent TPUs: memory and FLOPs per chip, never time.

The compiler comes with libtpu, which needs no TPU: pip install '.[tpu]'. A topology is named by
its chip and its shape in chips, `v5p:8x8x8`; Cloud TPU calls that slice v5p-1024, since it counts
cores for v4 and v5p, which have two per chip, and chips for v5e and v6e.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from ml_collections import ConfigDict

from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.sharding import device_mesh
from pgpsam_jax.training.plan import TrainingPlan
from pgpsam_jax.training.sharded_step import shard_step

Model = tuple[nnx.GraphDef, nnx.State, nnx.State]  # graphdef, params, frozen
_COUNTED_BY_CORE = ("v4", "v5p")


@dataclasses.dataclass(frozen=True)
class CompiledCost:
    """The compiler's plan for one chip.

    Attributes:
      arguments, temporaries, outputs: bytes.
      aliased: bytes of outputs that reuse arguments' memory.
      flops: without those of hand-written kernels; loop bodies count once. None if not counted.
      accessed: bytes that operations read and write, counted likewise.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    flops: float | None
    accessed: float | None

    @property
    def total(self) -> int:
        """Bytes of memory that the step needs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns (chip, shape) of a topology such as `v5e:4x8`."""
    match = re.fullmatch(r"(v\w+):(\d+(?:x\d+)*)", name)
    if not match:
        raise UserError(f"topology {name!r} is not a chip and a shape; write it as in v5e:2x2")
    return match[1], tuple(map(int, match[2].split("x")))


def slice_name(name: str) -> str:
    """Returns Cloud TPU's name of a topology: `v5p-1024` for `v5p:8x8x8`."""
    chip, shape = parse_topology(name)
    return f"{chip}-{math.prod(shape) * (2 if chip in _COUNTED_BY_CORE else 1)}"


def links(name: str, coordinates) -> int:
    """Returns the number of links over which each chip of a group receives concurrently.

    Two along each side of the slice that the group spans and that wraps around to a ring, one
    along any other side over which it extends. v5e and v6e wrap sides of 16; v4 and v5p wrap the
    sides of slices made of full 4x4x4 cubes.

    Args:
      name: of the topology.
      coordinates: of the group's chips.
    """
    chip, shape = parse_topology(name)
    cubes = len(shape) == 3 and all(side % 4 == 0 for side in shape)
    count = 0
    for side, values in zip(shape, zip(*coordinates, strict=True), strict=False):
        extent = len(set(values))
        closed = cubes if chip in _COUNTED_BY_CORE else side == 16
        count += 0 if extent == 1 else 2 if closed and extent == side else 1
    return count


def topology_devices(name: str) -> list:
    """Returns the chips of a TPU topology such as `v5e:2x2`, as compilation targets."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology {name!r} needs libtpu's compiler; pip install '.[tpu]'")
    # No chip is used: processes need not wait for each other or query cloud metadata.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Both cores of a v4 chip as one device, as JAX runs there; the default would be two.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"no TPU topology {name!r} ({str(error).splitlines()[0]}); name chip and shape as in "
            "v5e:2x2"
        ) from None


def abstract_model(settings: ConfigDict, num_classes: int, mesh) -> Model:
    """Returns (graphdef, params, frozen) of a configuration for the mesh, shapes only."""
    with device_mesh.traced_on(mesh):
        return build.abstract_model(settings, num_classes)


def lower_step(
    plan: TrainingPlan, mesh, model: Model, image_size: int, slices: int = 126, seed: int = 0
) -> jax.stages.Lowered:
    """Lowers the train step of an `abstract_model` for a mesh whose devices need not exist.

    Batches come from the host: float16 images, uint8 labels.

    Args:
      plan: how the run trains.
      mesh: the target devices.
      model: (graphdef, params, frozen).
      image_size: side of the slices in pixels.
      slices: of the few-shot set.
      seed: of augmentation.
    """
    sharding, size = device_mesh.batch_sharding(mesh), image_size
    batch = {
        name: jax.ShapeDtypeStruct((plan.batch_size, size, size), dtype, sharding=sharding)
        for name, dtype in (("image", np.float16), ("label", np.uint8))
    }
    return shard_step(plan, mesh, *model, batch, epoch_size=slices, seed=seed).lower()


def compile_step(
    settings: ConfigDict, plan: TrainingPlan, num_classes: int, mesh
) -> jax.stages.Compiled:
    """Compiles the train step of a configuration for the mesh.

    Args:
      settings: `config.model`.
      plan: how the run trains.
      num_classes: K, including the background.
      mesh: the target devices.
    """
    model = abstract_model(settings, num_classes, mesh)
    return lower_step(plan, mesh, model, settings.image_size).compile()


def compiled_cost(compiled: jax.stages.Compiled) -> CompiledCost:
    """Returns the compiler's plan for one chip; `UserError` if it makes none."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    if memory is None:
        raise UserError("the compiler plans no memory for this device; use CPU, GPU or TPU")
    return CompiledCost(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        cost.get("flops"),
        cost.get("bytes accessed"),
    )
