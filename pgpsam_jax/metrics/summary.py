"""Result files of an evaluation: `cases.csv`, `slices.csv`, `summary.json` and `summary.md`.

The summary is computed from the rows of the two tables, except the notes of the run, so it can be
recomputed without the volumes: `summarize(read_cases(path), read_slices(path))`. Protocols and
slices missing from older tables are left out.

Both means are reported because published tables do not say which one they print. The *class mean*
averages over the cases of each class first, then over classes; the *case mean* over the classes of
each case first. They differ if a class is undefined in some case. Undefined values (NaN) are
excluded from every mean and counted instead; the mean of no values is null in JSON.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pgpsam_jax.errors import UserError
from pgpsam_jax.metrics.aggregate import (
    INTERVAL,
    case_mean,
    class_mean,
    defined_mean,
    grouped_note,
    score_arrays,
    spread,
    unit_means,
)
from pgpsam_jax.metrics.protocols import COLUMNS, DEFINITIONS, METRICS, Row
from pgpsam_jax.metrics.release_protocol import SLICE_COLUMNS
from pgpsam_jax.metrics.summary_markdown import format_markdown
from pgpsam_jax.utils.files import StrPath, csv_text, write_json, write_text

_TYPES = {"class_id": int, "truth_voxels": int, "predicted_voxels": int, "value": float}
_TYPES |= {"slice": int, "dice": float}


def write_evaluation(
    rows: Sequence[Row],
    out_dir: StrPath,
    names: Sequence[str],
    meta: Mapping[str, Any],
    slices: Sequence[Row] = (),
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes the four files into `out_dir`, each atomically, and returns the summary.

    Args:
        rows: rows of all cases, from `score_case` and `score_release`.
        names: K class names, background first.
        meta: notes to add to `summary.json` (weights, definitions, ...); `summary.md` prints
            `notices`, `nsd_tolerance_mm` and `valid_min_pixels` of them.
        slices: rows of single slices, from `score_release`.
        groups: group of each case, if known, over which the intervals are.

    Raises:
        UserError: there is no case, or a case occurs twice.
    """
    summary = summarize(rows, slices, groups)
    found = list(summary["strict"]["per_class"])
    if found != list(names[1:]):
        raise ValueError(f"rows score the classes {found}, the label table has {list(names[1:])}")
    over = f". {grouped_note(summary['n_groups'])}" if groups else ""
    notes = {"interval": INTERVAL + over, "definitions": DEFINITIONS, "notices": [], **meta}
    if clash := set(notes) & set(summary):
        raise ValueError(f"meta may not replace {sorted(clash)}")
    summary |= _jsonable(notes)
    out_dir = Path(out_dir)
    write_text(out_dir / "cases.csv", _format(rows, COLUMNS, "value"))
    write_text(out_dir / "slices.csv", _format(slices, SLICE_COLUMNS, "dice"))
    write_json(out_dir / "summary.json", summary)
    write_text(out_dir / "summary.md", format_markdown(summary))
    return summary


def _format(rows: Sequence[Row], columns: tuple[str, ...], score: str) -> str:
    """Formats rows as CSV; scores in full precision, undefined ones as `nan`."""
    return csv_text(columns, ({**row, score: repr(float(row[score]))} for row in rows))


def read_cases(path: StrPath) -> list[Row]:
    """Reads the rows of a `cases.csv`; raises `UserError` if the file is not one."""
    return _read(path, COLUMNS)


def read_slices(path: StrPath) -> list[Row]:
    """Reads the rows of a `slices.csv`; raises `UserError` if the file is not one."""
    return _read(path, SLICE_COLUMNS)


def _read(path: StrPath, columns: tuple[str, ...]) -> list[Row]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != columns:
                raise ValueError(f"the columns are not {', '.join(columns)}")
            return [_typed(row, reader.line_num) for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is not a readable evaluation table ({error}); run the evaluation again."
        ) from error


def _typed(row: dict[str, Any], line: int) -> dict[str, Any]:
    if None in row or None in row.values():
        raise ValueError(f"line {line} does not have {len(row) - (None in row)} fields")
    return {key: _TYPES.get(key, str)(text) for key, text in row.items()}


def summarize(
    rows: Sequence[Row], slices: Sequence[Row] = (), groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Computes class means, case means and per-class statistics of each protocol.

    Undefined values are None. With rows of single slices, `release` also has `slice_dice`,
    `slice_mcdice` and their counts. With groups of cases, SDs and intervals are over groups, of
    which `n_groups` is the number.
    """
    if not rows:
        raise UserError("no case was evaluated; check that the evaluation list is not empty.")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    classes = dict(sorted({row["class_id"]: row["class"] for row in rows}.items()))
    written = {row["protocol"] for row in rows}
    summary = {
        protocol: _summarize_protocol(rows, protocol, cases, classes, groups or {})
        for protocol in METRICS
        if protocol in written
    }
    if slices:
        _add_slices(summary["release"], slices)
    count: dict[str, Any] = {"n_cases": len(cases)}
    if groups:
        count["n_groups"] = len({groups.get(case, case) for case in cases})
    return _jsonable(summary | count)


def _add_slices(release: dict[str, Any], slices: Sequence[Row]) -> None:
    """Adds the slice mode to the summary of the protocol and of each class."""
    items = {key: i for i, key in enumerate(dict.fromkeys(map(_slice_key, slices)))}
    per_class = release["per_class"]
    columns = {name: j for j, name in enumerate(per_class)}
    scores = np.full((len(items), len(columns)), np.nan)
    for row in slices:
        scores[items[_slice_key(row)], columns[row["class"]]] = row["dice"]
    release["slice_dice"] = case_mean(scores)
    release["slice_mcdice"] = class_mean(scores)
    release["n_slices"] = len(items)
    for name, column in columns.items():
        per_class[name]["slice_dice"] = defined_mean(scores[:, column])
        per_class[name]["n_slices"] = int(np.isfinite(scores[:, column]).sum())


def _slice_key(row: Row) -> tuple[str, int]:
    return row["case"], row["slice"]


def _summarize_protocol(
    rows: Sequence[Row],
    protocol: str,
    cases: Sequence[str],
    classes: Mapping[int, str],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    units = [groups.get(case, case) for case in cases]
    values, status = score_arrays(rows, protocol, cases, classes)
    means: dict[str, Any] = {}
    for metric, table in values.items():
        means[f"{metric}_class_mean"] = class_mean(table)
        means[f"{metric}_case_mean"] = case_mean(table)
    means |= _spread(unit_means(defined_mean(values["dice"], axis=1), units), "dice_case")
    per_class = {}
    for column, name in enumerate(classes.values()):
        scores = {metric: table[:, column] for metric, table in values.items()}
        entry: dict[str, Any] = {metric: defined_mean(score) for metric, score in scores.items()}
        entry["n"] = int(np.isfinite(scores["dice"]).sum())
        for kind in ("both_empty", "missed", "hallucinated"):
            entry[f"n_{kind}"] = int((status[:, column] == kind).sum())
        if "hd95" in scores:
            entry["n_hd95"] = int(np.isfinite(scores["hd95"]).sum())
        for metric, score in scores.items():
            entry |= _spread(unit_means(score, units), metric)
        per_class[name] = entry
    return means | {"per_class": per_class}


def _spread(values: ArrayLike, label: str) -> dict[str, Any]:
    return dict(zip((f"{label}_sd", f"{label}_ci95"), spread(values), strict=True))


def _jsonable(value: Any) -> Any:
    """Converts to plain Python values; NaN and infinity become None, as JSON lacks them."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str | bool | None) else str(value)
