"""The folder of a study: one CSV file for each kind of point, rows as they are finished.

Everything else in the folder is made from these files.
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
    """A kind of point and the columns of its file, `<name>.csv`, with their types."""

    name: str
    point: type
    columns: dict[str, type]

    def key(self, row: dict) -> str:
        """The key of the point that a row is of."""
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
    """Rows by key of an earlier start, empty cells None; {} if there was none."""
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
    """The CSV file, with efficiencies as things stand."""
    fill_efficiency(kind, list(rows.values()))
    filled = (
        {name: "" if row.get(name) is None else row[name] for name in kind.columns}
        for row in rows.values()
    )
    write_text(Path(folder) / f"{kind.name}.csv", csv_text(list(kind.columns), filled))


def series_of(kind: Kind, row: dict) -> tuple:
    """What rows of one line of a chart have in common: everything but the number of devices.

    Compiled points grow weakly (the batch of a chip stays); so do measured ones of that name.
    """
    names = set(_fields(kind.point)) - {"devices", "topology"}
    if row.get("scaling") == "strong":
        names -= {"batch"}
    shared = tuple(row[name] for name in sorted(names))
    if kind is COMPILED:
        return (*shared, row["topology"].split(":")[0])
    return (*shared, row["device"], row["global_batch"] if row["scaling"] == "strong" else None)


def series(kind: Kind, rows: list[dict]) -> list[list[dict]]:
    """Rows that ran or would fit by series, each in order of devices."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == OK and row.get(_rate(kind)) is not None:
            found.setdefault(series_of(kind, row), []).append(row)
    return [sorted(one, key=lambda row: row[devices(kind)]) for one in found.values()]


def fill_efficiency(kind: Kind, rows: list[dict]) -> None:
    """Images per second and device over those of the series' smallest row."""
    rate, count = _rate(kind), devices(kind)
    for one in series(kind, rows):
        smallest = one[0][rate] / one[0][count]
        for row in one:
            name = "efficiency" if kind is MEASURED else "estimate_efficiency"
            row[name] = row[rate] / row[count] / smallest


def devices(kind: Kind) -> str:
    """The column with the number of devices."""
    return "devices" if kind is MEASURED else "chips"


def _rate(kind: Kind) -> str:
    return "images_per_second" if kind is MEASURED else "estimate_images_per_second"
