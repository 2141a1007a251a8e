"""Colors that the encoder sees, and the initialization of release, H-SAM and SurgicalSAM.

pgpsam grid conventions --workdir runs/conventions

Rows in addition to `table1`, each with one change: colors from 0 to 1, as the authors of PGP-SAM,
SAMed and H-SAM pass them to SAM; or the other initialization (`model.start`) of the methods that
keep their authors'.
"""

from experiments.grid.plan import Plan, Row, method_rows
from experiments.grids._targets import SYNAPSE, target

_UNIT, _NORMALIZED = {"model.colors": "unit"}, {"model.colors": "normalized"}
_CHANGES = {
    "pgpsam_paper": (("unit", "colors from 0 to 1", _UNIT),),
    "samed": (("unit", "colors from 0 to 1", _UNIT),),
    "pgpsam_release": (
        ("normalized", "normalized colors", _NORMALIZED),
        ("sam", "normalized colors, start from SAM", _NORMALIZED | {"model.start": "sam"}),
    ),
    "hsam": (("sam", "start from SAM", {"model.start": "sam"}),),
    "surgicalsam": (("sam", "start from SAM", {"model.start": "sam"}),),
}


def get_grid(variant: str = SYNAPSE) -> Plan:
    rows = []
    for row in method_rows():
        for name, label, change in _CHANGES.get(row.name, ()):
            rows.append(Row(f"{row.name}_{name}", f"{row.label}: {label}", row.overrides | change))
    return Plan(title="Colors and starts, one change per row", rows=tuple(rows), **target(variant))
