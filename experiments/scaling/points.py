"""Points of a scaling study: one training step on one mesh each."""

import dataclasses
import itertools
import re

from experiments.measurement.points import Point, cross
from pgpsam_jax.errors import UserError
from pgpsam_jax.profiling import aot

# From one host to the largest slice of v5e and v6e and to 512 chips of v4 and v5p.
TOPOLOGIES = (
    *("v4:2x2x1", "v4:4x4x4", "v4:8x8x8"),
    *("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:4x4x4", "v5p:8x8x8"),
    *("v6e:2x4", "v6e:8x8", "v6e:16x16"),
)


@dataclasses.dataclass(frozen=True)
class Step(Point):
    """A training step on a mesh, measured or compiled.

    The global batch is `batch` times data times fsdp, since the chips of a tensor group share their
    images. mesh: as in `mesh_sizes`.
    """

    mesh: str = "data"

    def __post_init__(self):
        super().__post_init__()
        mesh_sizes(self.mesh)

    def config(self, devices: int):
        """Returns the configuration of a run with this step on a number of devices."""
        config = super().config()
        config.mesh.update(mesh_sizes(self.mesh))
        config.train.batch_size *= self.data_shards(devices)
        return config

    def data_shards(self, devices: int) -> int:
        """Returns the number of data shards: data times fsdp."""
        tensor = mesh_sizes(self.mesh)["tensor"]
        shards = 1 if tensor == -1 else devices // tensor
        if shards < 1:
            raise UserError(
                f"mesh {self.mesh!r} has more devices in a tensor group than the {devices} there "
                "are; choose a smaller tensor axis"
            )
        return shards


@dataclasses.dataclass(frozen=True)
class Compiled(Step):
    """A step to compile for a topology, such as `v5e:2x2`."""

    topology: str = "v5e:2x2"

    def __post_init__(self):
        super().__post_init__()
        aot.parse_topology(self.topology)


@dataclasses.dataclass(frozen=True)
class Measured(Step):
    """A step to time on the first local devices.

    scaling: `weak` (the same batch per chip on all numbers of devices) or `strong` (the same global
    batch). simulated: whether the devices are threads of one CPU.
    """

    scaling: str = "weak"
    devices: int = 1
    simulated: int = 0


def mesh_sizes(words: str) -> dict[str, int]:
    """Returns `config.mesh` for words such as `data`, `fsdp`, `tensor4`, `fsdp8`, `fsdp+tensor4`.

    An axis with a number has that size; one without takes the rest, data if there is none.
    """
    sizes = {"data": 0, "fsdp": 0, "tensor": 0}
    for word in words.split("+"):
        match = re.fullmatch(r"(data|fsdp|tensor)([1-9]\d*)?", word)
        if not match or sizes[match[1]]:
            raise UserError(
                f"mesh {words!r} unknown; write axes joined by +, each with a size or taking the "
                "rest, such as data, fsdp, tensor4, fsdp8+tensor2"
            )
        sizes[match[1]] = int(match[2] or -1)
    if -1 not in sizes.values() and not sizes["data"]:
        sizes["data"] = -1
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {words!r} gives the rest to several axes; size all but one")
    return {name: size or 1 for name, size in sizes.items()}


def measured_points(devices: int, counts, scalings, simulated: bool, **lists) -> list[Measured]:
    """Returns points of weak and strong scaling, which agree on the largest number of devices.

    Args:
      devices: that are there.
      counts: numbers of devices; empty for the powers of two and all.
      scalings: `weak`, `strong`.
      simulated: whether the devices are threads of one CPU.
      lists: values of the fields of `Step`.
    """
    counts = counts or [n for n in (2**i for i in range(32)) if n < devices] + [devices]
    if max(counts) > devices or min(counts) < 1:
        raise UserError(
            f"--devices must be numbers from 1 to {devices}, the devices that are there"
        )
    points = []
    for step in cross(Measured, **lists):
        most = step.data_shards(max(counts))
        for scaling, count in itertools.product(scalings, sorted(counts)):
            if scaling not in ("weak", "strong"):
                raise UserError(f"--scaling {scaling!r} unknown; choose from weak, strong")
            shards = step.data_shards(count)
            batch = step.batch if scaling == "weak" else step.batch * most // shards
            changes = dict(scaling=scaling, devices=count, batch=batch, simulated=int(simulated))
            points.append(dataclasses.replace(step, **changes))
    return points
