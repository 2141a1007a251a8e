"""CSV tables of measurements: one file per kind of point, with a row per finished point.

Everything else in the folder is derived from these files.
"""

import csv
import dataclasses
import json
from pathlib import Path

from experiments.measurement.points import Point
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import csv_text, write_text

OK, TOO_LARGE, FAILED = "ok", "does not fit", "failed"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of point, and the file `<name>.csv` of its rows.

    Attributes:
      results: types of the columns besides the point's fields, `status` and `reason`; a `dict` is
        stored as JSON.
    """

    name: str
    point: type[Point]
    results: dict[str, type]

    @property
    def columns(self) -> dict[str, type]:
        fields = {field.name: field.type for field in dataclasses.fields(self.point)}
        return fields | {"status": str, "reason": str} | self.results

    def point_of(self, row: dict) -> Point:
        return self.point(**{f.name: row[f.name] for f in dataclasses.fields(self.point)})

    def complete(self, rows: list[dict]) -> None:
        """Sets the columns that depend on several rows."""


def load(folder, kind: Kind) -> dict[str, dict]:
    """Returns the rows of an earlier run by key; {} if there are none. Empty: "" or None."""
    path = Path(folder) / f"{kind.name}.csv"
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := kind.columns.keys() - set(reader.fieldnames or ()):
                raise KeyError(*missing)
            rows = [
                {name: _value(row[name], of) for name, of in kind.columns.items()} for row in reader
            ]
        return {kind.point_of(row).key: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); give another --output") from None


def _value(text: str, of: type):
    return (json.loads if of is dict else of)(text) if text or of is str else None


def _cell(value):
    return json.dumps(value) if isinstance(value, dict) else "" if value is None else value


def store(folder, kind: Kind, rows: dict[str, dict]) -> None:
    """Writes the CSV file, completed."""
    kind.complete(list(rows.values()))
    cells = ({name: _cell(row.get(name)) for name in kind.columns} for row in rows.values())
    write_text(Path(folder) / f"{kind.name}.csv", csv_text(list(kind.columns), cells))
