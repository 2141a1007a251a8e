"""Roofline estimate of a step on a TPU chip: three lower bounds on its time, not a measurement.

compute: FLOPs over the dense bfloat16 peak; hbm: bytes to and from the chip's memory over its
bandwidth (`hlo_traffic.py`); ici: bytes received in collectives, one after the other, over the
links of the group's chips. The estimate is their maximum: full overlap, full rates, no latency.
Rates: `profiling/accelerators.py`; links: `aot.links`. A group uses all its links, a permutation
one.
"""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.scaling.hlo_collectives import KINDS, Collective
from pgpsam_jax.profiling import aot
from pgpsam_jax.profiling.accelerators import Chip


class Estimate(NamedTuple):
    """Lower bound on the seconds of a step, per resource of a chip."""

    compute: float
    hbm: float
    ici: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def binds(self) -> str:
        """Returns the resource of the largest bound."""
        return self._fields[self.index(self.seconds)]


def estimate(chip: Chip, flops: float, moved: float, exchanged: float) -> Estimate:
    """Returns the bounds for a chip's FLOPs, memory traffic (bytes) and `exchange_seconds`."""
    return Estimate(flops / chip.bf16_flops, moved / chip.memory_bandwidth, exchanged)


def exchange_seconds(
    chip: Chip, name: str, found: Iterable[Collective], coordinates: list[tuple[int, ...]]
) -> float:
    """Returns the seconds of a chip's collectives in a topology.

    coordinates: of the chips, in the order of the mesh.
    """
    total = 0.0
    for one in found:
        if one.size:
            group = [coordinates[place] for place in one.group]
            count = 1 if one.kind == "collective-permute" else aot.links(name, group)
            total += one.times * one.size / (count * chip.link_bandwidth)
    return total


def by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Returns {kind: (number of runs, bytes received)} for all kinds."""
    totals = {kind: (0, 0.0) for kind in KINDS}
    for one in found:
        count, size = totals[one.kind]
        totals[one.kind] = count + one.times, size + one.times * one.size
    return totals
