"""Training steps compiled for TPUs that are not there: memory and FLOPs of a chip, never time.

The compiler comes with libtpu, which needs no TPU: pip install '.[tpu]'.
"""

import dataclasses
import importlib.util
import os

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from pgpsam_jax import build, sharding
from pgpsam_jax.errors import UserError
from pgpsam_jax.sharded import shard_step


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one chip, bytes: what it is given, what it needs besides, outputs in place of arguments.

    flops leave out those of hand-written kernels; None where the compiler keeps no count.
    """

    arguments: int
    temporaries: int
    aliased: int
    flops: float | None


def devices(name: str) -> list:
    """The chips of a TPU topology such as `v5e:2x2` or `v6e:4x4`, only to be compiled for."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology {name!r} needs libtpu's compiler; pip install '.[tpu]'")
    # No chip is held, so processes need not wait for one another, nor ask a cloud who they are.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(name, "tpu").devices)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"no TPU topology {name!r} ({str(error).splitlines()[0]}); name chip and shape as in "
            "v5e:2x2"
        ) from None


def compile_step(config: ConfigDict, num_classes: int, mesh, slices: int = 126):
    """The training step of a configuration on a mesh whose devices need not exist, compiled.

    slices: of the few-shot set. Batches come from the host: float16 images, uint8 labels.
    """
    graphdef, params, frozen = sharding.over_mesh(build.abstract_model, mesh)(config, num_classes)
    lanes, size = sharding.batch_sharding(mesh), config.model.image_size
    batch = {
        name: jax.ShapeDtypeStruct((config.train.batch_size, size, size), dtype, sharding=lanes)
        for name, dtype in (("image", np.float16), ("label", np.uint8))
    }
    step = shard_step(
        config, mesh, graphdef, params, frozen, batch, epoch_size=slices, seed=config.seed
    )
    return step.lower().compile()


def figures(compiled: jax.stages.Compiled) -> Figures:
    """What the compiler plans for one chip."""
    memory = compiled.memory_analysis()
    return Figures(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        (compiled.cost_analysis() or {}).get("flops"),
    )
