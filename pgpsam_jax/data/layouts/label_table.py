"""Label tables: source id -> class id, with class names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils import shipped
from pgpsam_jax.utils.untrusted_text import read_user_json

_LONGEST = 80  # characters of a name, for tables and figures
_UNKNOWN = 255  # marks ids outside the table during a remap, hence at most 255 classes


@dataclass(frozen=True)
class LabelTable:
    """Class names and the class of each source id.

    Attributes:
        names: by class id; the first is "background".
        source_to_class: source id -> class id, 0..num_classes-1; always has 0 -> 0.
        other: what to do with other source ids, "error" or "background".
    """

    names: tuple[str, ...]
    source_to_class: Mapping[int, int]
    other: str = "error"

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "source_to_class", {0: 0, **self.source_to_class})
        _check(self)

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.names)

    @property
    def organs(self) -> dict[int, str]:
        """Class name per source id, without the background."""
        return {i: self.names[k] for i, k in self.source_to_class.items() if k}

    def remap(self, array: np.ndarray, path) -> np.ndarray:
        """Converts source ids (integers of any shape) to class ids, uint8.

        Raises:
            UserError: `path` holds ids outside the table.
        """
        top = max(self.source_to_class)
        lookup = np.full(top + 2, _UNKNOWN if self.other == "error" else 0, np.uint8)
        lookup[list(self.source_to_class)] = list(self.source_to_class.values())
        if array.size and (array.min() < 0 or array.max() > top):
            listed = (array >= 0) & (array <= top)
            result = lookup[np.where(listed, array, top + 1)]
        else:
            result = lookup[array]
        if self.other == "error" and (result == _UNKNOWN).any():
            values, numbers = np.unique(array[result == _UNKNOWN], return_counts=True)
            counts = dict(zip(values.tolist(), numbers.tolist(), strict=True))
            raise UserError(f"{path} {self.describe_unknown(counts)}")
        return result

    def describe_unknown(self, counts: Mapping[int, int]) -> str:
        """Returns the error about ids outside the table, from voxels per id; empty if none is."""
        unknown = {i: n for i, n in counts.items() if i not in self.source_to_class}
        if not unknown or self.other != "error":
            return ""
        listed = ", ".join(
            f"{i} ({n} voxel{'s' * (n != 1)})" for i, n in list(unknown.items())[:10]
        )
        more = ", ..." if len(unknown) > 10 else ""
        return (
            f"holds label values outside the label table: {listed}{more}; add them to the table "
            'or set its "other" to "background"'
        )

    def to_json(self) -> dict:
        """Returns a JSON value, inverse of `from_json`."""
        classes = [
            {"name": name, "source": sorted(s for s, c in self.source_to_class.items() if c == k)}
            for k, name in enumerate(self.names)
        ]
        value = {"classes": classes[1:], "other": self.other}
        ignored = [source for source in classes[0]["source"] if source != 0]
        return value | ({"background": ignored} if ignored else {})

    @classmethod
    def from_json(cls, value, where="label table") -> "LabelTable":
        """Parses `{"classes": [{"name", "source": [ids]}], "other", "background": [ids]}`.

        The last two are optional; a class "background" may be among the others, also with id 0.
        Short forms are `{"1": "liver"}`, `{"liver": 1}`, `["background", "liver"]` and the
        `{"labels": ...}` of a `dataset.json`.

        Args:
            value: the parsed JSON.
            where: start of error messages, such as the file name.
        """
        value = _in_full(value, where)
        value = _fields(value, {"classes": list, "other": str, "background": list}, where)
        groups = [{"name": "background", "source": value.get("background", [])}]
        for entry in value.get("classes", []):
            groups.append(_fields(entry, {"name": str, "source": object}, where))
        table, names = {0: 0}, ["background"]
        for group in groups:
            name, sources, class_id = group.get("name", ""), group.get("source", []), 0
            if name != "background":
                names.append(name)
                class_id = len(names) - 1
            for source in sources if isinstance(sources, list) else [sources]:
                label = as_id(source)
                if label == 0 and class_id == 0:
                    continue
                if label is None or label in table:
                    raise UserError(
                        f"{where}: source id {source!r:.60} of class {names[class_id]!r:.60} must "
                        "be an integer above 0 that no other class lists"
                    )
                table[label] = class_id
        try:
            return cls(tuple(names), table, value.get("other", "error"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def load_label_table(path) -> LabelTable:
    """Reads a label table from a JSON file (a shipped one: `configs/labels/NAME.json`)."""
    path = shipped.find(path)
    if not path.is_file():
        what = "cannot be read: it is a folder" if path.is_dir() else "not found"
        raise UserError(f"label table {path} {what}; write a file that names every class")
    return LabelTable.from_json(read_user_json(path, "label table"), str(path))


def as_id(value) -> int | None:
    """Returns the label id of a JSON value (1, 1.0 and "1" are the same), or None."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _in_full(value, where: str):
    """Expands a short form; returns other values unchanged."""
    if isinstance(value, dict) and "classes" not in value:
        inner = value.get("labels")
        value = inner if isinstance(inner, dict | list) and inner else value
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        if value[0] != "background":
            raise UserError(f'{where}: a list of names is by id and starts with "background"')
        pairs = [(name, i) for i, name in enumerate(value)]
    elif isinstance(value, dict) and value and not value.keys() & {"classes", "other"}:
        if all(isinstance(i, str) and as_id(i) is None for i in value.values()) and all(
            as_id(name) is not None for name in value
        ):
            pairs = [(name, i) for i, name in value.items()]
        elif all(map(_ids, value.values())) and not all(as_id(name) for name in value):
            pairs = list(value.items())
        else:
            return value
    else:
        return value
    for name, ids in pairs:
        if name == "ignore":
            raise UserError(f"{where}: an ignore label is not supported; label those voxels")
        if as_id(ids) == 0 and name != "background":
            raise UserError(f'{where}: id 0 is always "background", not {name!r:.60}')
    return {"classes": [{"name": name, "source": ids} for name, ids in pairs]}


def _ids(value) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(as_id(item) is not None for item in values)


def _fields(value, types: dict, where: str) -> dict:
    """Checks that a JSON object has only expected keys with values of the expected types."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with {', '.join(types)}, got {value!r:.60}")
    for key, item in value.items():
        if key not in types:
            raise UserError(f"{where}: unknown key {key!r:.60}; known are {', '.join(types)}")
        if not isinstance(item, types[key]):
            raise UserError(f"{where}: {key!r} must be a {types[key].__name__}, got {item!r:.60}")
    return value


def _check(table: LabelTable) -> None:
    names, mapping = table.names, table.source_to_class
    if not 2 <= len(names) <= _UNKNOWN or names[0] != "background":
        raise UserError(
            f'needs "background" and 1 to {_UNKNOWN - 1} named classes, got {len(names)}'
        )
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"every class needs a name, got {name!r:.60}")
        if not name.isprintable() or len(name) > _LONGEST:
            raise UserError(
                f"the name {name!r:.60} has control characters or over {_LONGEST} characters"
            )
    if len(set(names)) < len(names):
        raise UserError(f"class names must differ, got {sorted(names)!r:.400}")
    for source, target in mapping.items():
        if type(source) is not int or not 0 <= source < 1 << 16:
            raise UserError(f"source ids must be integers in 0..65535, got {source!r:.60}")
        if type(target) is not int or not 0 <= target < len(names):
            raise UserError(f"source id {source} points to class {target!r}, which has no name")
    if mapping[0] != 0:
        raise UserError("source id 0 is always background")
    missing = [name for k, name in enumerate(names) if k not in mapping.values()]
    if missing:
        raise UserError(f"no source id for {', '.join(missing)}")
    if table.other not in ("error", "background"):
        raise UserError(f'"other" must be "error" or "background", got {table.other!r}')


_ORGANS = "spleen right_kidney left_kidney gallbladder liver stomach aorta pancreas"
SYNAPSE8 = LabelTable(
    names=("background", *_ORGANS.split()),
    # BTCV ids: 5 esophagus, 9 vena cava, 10 portal and splenic veins, 12 and 13 adrenal glands.
    source_to_class=dict.fromkeys((5, 9, 10, 12, 13), 0)
    | {1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8},
)
