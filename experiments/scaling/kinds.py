"""The CSV tables of a study, their columns, and their rows as the lines of a chart."""

import dataclasses

from experiments.measurement import timing
from experiments.measurement.csv_table import OK, Kind
from experiments.scaling.hlo_collectives import KINDS
from experiments.scaling.points import Compiled, Measured

_MESH = {"data": int, "fsdp": int, "tensor": int, "global_batch": int, "device": str}
_COMPILATION = {"trace_seconds": float, "compile_seconds": float}


@dataclasses.dataclass(frozen=True)
class ScalingKind(Kind):
    """A kind of point with its columns for the number of devices, images/s and efficiency."""

    devices: str
    rate: str
    efficiency: str

    def complete(self, rows: list[dict]) -> None:
        """Sets images per second and device over those of the smallest row of the series."""
        for one in self.series(rows):
            smallest = one[0][self.rate] / one[0][self.devices]
            for row in one:
                row[self.efficiency] = row[self.rate] / row[self.devices] / smallest

    def series(self, rows: list[dict]) -> list[list[dict]]:
        """Groups the rows that ran or would fit by series, sorted by number of devices."""
        found: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["status"] == OK and row.get(self.rate) is not None:
                found.setdefault(self._series_of(row), []).append(row)
        return [sorted(one, key=lambda row: row[self.devices]) for one in found.values()]

    def _series_of(self, row: dict) -> tuple:
        """Returns the common values of the rows in a line: all but the number of devices.

        Compiled points are in weak scaling: constant batch per chip.
        """
        names = {field.name for field in dataclasses.fields(self.point)} - {"devices", "topology"}
        if row.get("scaling") == "strong":
            names -= {"batch"}
        shared = tuple(row[name] for name in sorted(names))
        if "topology" in row:
            return (*shared, row["topology"].split(":")[0])
        return (*shared, row["device"], row["global_batch"] if row["scaling"] == "strong" else None)


MEASURED = ScalingKind(
    "measured",
    Measured,
    _MESH
    | {"platform": str, "stopped_by_budget": int, "efficiency": float}
    | timing.COLUMNS
    | {"flops_per_image": float, "planned_bytes": int}
    | _COMPILATION
    | {"note": str},
    devices="devices",
    rate="images_per_second",
    efficiency="efficiency",
)

COMPILED = ScalingKind(
    "compiled",
    Compiled,
    {"slice": str, "chips": int}
    | _MESH
    | {"largest_that_fits": int, "trained_parameters": int, "frozen_parameters": int}
    | {f"{part}_bytes": int for part in "arguments temporaries outputs aliased total limit".split()}
    | {"xla_flops": float, "formula_flops": float, "accessed_bytes": float, "hbm_bytes": float}
    | {f"{kind}_{what}": float for kind in KINDS for what in ("count", "bytes")}
    | {"ici_bytes": float, "loops_unknown": int, "exchanges": str}
    | {f"estimate_{term}_seconds": float for term in ("compute", "hbm", "ici")}
    | {"estimate_seconds": float, "estimate_binds": str}
    | {f"estimate_{what}": float for what in ("images_per_second", "efficiency", "mfu")}
    | _COMPILATION
    | {"jax": str, "libtpu": str},
    devices="chips",
    rate="estimate_images_per_second",
    efficiency="estimate_efficiency",
)
