"""The roofline estimate of a step on a TPU chip: three lower bounds on its time, never a time.

compute: FLOPs over the dense bfloat16 peak; hbm: bytes to and from the chip's memory over its
bandwidth (`hlo_traffic.py`); ici: bytes received in collectives, one after the other, over the
links of the group's chips. The estimate is the largest of them: full overlap, full rates, no
latency. Rates: `profiling/accelerators.py`; links: `aot.links`. A group's links are all taken to
serve it, a permutation to need one.
"""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.scaling.hlo_collectives import KINDS, Collective
from pgpsam_jax.profiling import aot
from pgpsam_jax.profiling.accelerators import Chip


class Estimate(NamedTuple):
    """Seconds of a step that each of a chip's resources needs at least."""

    compute: float
    hbm: float
    ici: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def binds(self) -> str:
        """The resource that the estimate comes from."""
        return self._fields[self.index(self.seconds)]


def estimate(chip: Chip, flops: float, moved: float, exchanged: float) -> Estimate:
    """From one chip's FLOPs, bytes to and from memory and seconds of `exchange_seconds`."""
    return Estimate(flops / chip.bf16_flops, moved / chip.memory_bandwidth, exchanged)


def exchange_seconds(
    chip: Chip, name: str, found: Iterable[Collective], coordinates: list[tuple[int, ...]]
) -> float:
    """Seconds of a chip's links in a topology; coordinates: of the chips, by place in the mesh."""
    total = 0.0
    for one in found:
        if one.size:
            group = [coordinates[place] for place in one.group]
            count = 1 if one.kind == "collective-permute" else aot.links(name, group)
            total += one.times * one.size / (count * chip.link_bandwidth)
    return total


def by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """{kind: (how many run, bytes received)}, every kind."""
    totals = {kind: (0, 0.0) for kind in KINDS}
    for one in found:
        count, size = totals[one.kind]
        totals[one.kind] = count + one.times, size + one.times * one.size
    return totals
