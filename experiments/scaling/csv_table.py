"""CSV tables of a study: one file per kind of point, with a row per finished point.

Everything else in the folder is derived from these files.
"""

import csv
import dataclasses
from pathlib import Path

from experiments.scaling.hlo_collectives import KINDS
from experiments.scaling.points import Compiled, Measured
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import csv_text, write_text

OK, TOO_LARGE, FAILED = "ok", "does not fit", "failed"
_OUTCOME = {"status": str, "reason": str}
_MESH = {"data": int, "fsdp": int, "tensor": int, "global_batch": int, "device": str}


def _fields(point) -> dict[str, type]:
    return {field.name: field.type for field in dataclasses.fields(point)}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of point, and the typed columns of its file `<name>.csv`."""

    name: str
    point: type
    columns: dict[str, type]

    def key(self, row: dict) -> str:
        """Returns the key of the row's point."""
        return self.point(**{name: row[name] for name in _fields(self.point)}).key


MEASURED = Kind(
    "measured",
    Measured,
    _fields(Measured)
    | _OUTCOME
    | _MESH
    | {
        "platform": str,
        "steps": int,
        "stopped_by_budget": int,
        "median_seconds": float,
        "first_quartile_seconds": float,
        "third_quartile_seconds": float,
        "images_per_second": float,
        "efficiency": float,
        "flops_per_image": float,
        "mfu": float,
        "peak_bytes": float,
        "planned_bytes": int,
        "trace_seconds": float,
        "compile_seconds": float,
        "note": str,
    },
)

COMPILED = Kind(
    "compiled",
    Compiled,
    _fields(Compiled)
    | {"slice": str, "chips": int}
    | _OUTCOME
    | _MESH
    | {"largest_that_fits": int, "trained_parameters": int, "frozen_parameters": int}
    | {f"{part}_bytes": int for part in "arguments temporaries outputs aliased total limit".split()}
    | {"xla_flops": float, "formula_flops": float, "accessed_bytes": float, "hbm_bytes": float}
    | {f"{kind}_{what}": float for kind in KINDS for what in ("count", "bytes")}
    | {"ici_bytes": float, "loops_unknown": int, "exchanges": str}
    | {f"estimate_{term}_seconds": float for term in ("compute", "hbm", "ici")}
    | {"estimate_seconds": float, "estimate_binds": str}
    | {name: float for name in ("estimate_images_per_second", "estimate_efficiency")}
    | {"estimate_mfu": float, "trace_seconds": float, "compile_seconds": float}
    | {"jax": str, "libtpu": str},
)


def load(folder, kind: Kind) -> dict[str, dict]:
    """Returns the rows of an earlier run by key, with None in empty cells; {} if there are none."""
    path = Path(folder) / f"{kind.name}.csv"
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {name: _value(row[name], of) for name, of in kind.columns.items()}
                for row in csv.DictReader(file)
            ]
        return {kind.key(row): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); give another --output") from None


def _value(text: str, of: type):
    return of(text) if text else None


def store(folder, kind: Kind, rows: dict[str, dict]) -> None:
    """Writes the CSV file with current efficiencies."""
    fill_efficiency(kind, list(rows.values()))
    filled = (
        {name: "" if row.get(name) is None else row[name] for name in kind.columns}
        for row in rows.values()
    )
    write_text(Path(folder) / f"{kind.name}.csv", csv_text(list(kind.columns), filled))


def series_of(kind: Kind, row: dict) -> tuple:
    """Returns the common values of the rows in a line of a chart: all but the number of devices.

    Compiled points are in weak scaling: constant batch per chip.
    """
    names = set(_fields(kind.point)) - {"devices", "topology"}
    if row.get("scaling") == "strong":
        names -= {"batch"}
    shared = tuple(row[name] for name in sorted(names))
    if kind is COMPILED:
        return (*shared, row["topology"].split(":")[0])
    return (*shared, row["device"], row["global_batch"] if row["scaling"] == "strong" else None)


def series(kind: Kind, rows: list[dict]) -> list[list[dict]]:
    """Groups the rows that ran or would fit by series, sorted by number of devices."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == OK and row.get(_rate(kind)) is not None:
            found.setdefault(series_of(kind, row), []).append(row)
    return [sorted(one, key=lambda row: row[devices(kind)]) for one in found.values()]


def fill_efficiency(kind: Kind, rows: list[dict]) -> None:
    """Sets images per second and device over those of the smallest row of the series."""
    rate, count = _rate(kind), devices(kind)
    for one in series(kind, rows):
        smallest = one[0][rate] / one[0][count]
        for row in one:
            name = "efficiency" if kind is MEASURED else "estimate_efficiency"
            row[name] = row[rate] / row[count] / smallest


def devices(kind: Kind) -> str:
    """Returns the column with the number of devices."""
    return "devices" if kind is MEASURED else "chips"


def _rate(kind: Kind) -> str:
    return "images_per_second" if kind is MEASURED else "estimate_images_per_second"
