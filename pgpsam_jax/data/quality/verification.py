"""Data-set verification: runs all checks, caches them per case, and reports the findings.

The report is JSON: `schema` 3, `root`, `layout`, `label_table` (or null), `files` (the file records
of `case_checks.check_case`, with `case`, `part` and `group`), `data_set` (findings without a single
file), `order` (`label_order.check_label_order`) and `counts` (files, cases, errors, warnings). A
finding has `level` ("error" or "warning"), `code`, `file` and `message`. Codes of errors:
- of a file: missing, unreadable, damaged (cut off, checksum), name, header, shape (4-D), dtype,
  size, trailing (inflates past its header), affine (singular), key, storage, not_finite,
  not_integer, unknown_label, window;
- of a pair or the data set: missing_pair, shape_mismatch, affine_conflict, duplicate_id, duplicate
  (the same voxels), both_splits, split, order, no_table, shape (plain arrays with swapped axes).
Codes of warnings:
- of a file or a pair: trailing (a little), no_orientation, two_affines, shear, scaled, intensity,
  constant, empty, absent, affine_mismatch, orientation_lost, turned;
- across cases: cut (labels clipped by normalization), duplicate (of labels), neighbors (of one
  person), slices, count, unlike (intensities), spacing, axis, volume, size.
"""

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pgpsam_jax.data.findings import ERROR, WARNING, Finding
from pgpsam_jax.data.io import array_checks, volumes
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.data.preprocessing import Window, is_relative, window_of
from pgpsam_jax.data.quality import clipping, neighbors, outliers
from pgpsam_jax.data.quality.case_checks import check_case
from pgpsam_jax.data.quality.label_order import check_label_order
from pgpsam_jax.data.quality.organ_priors import organ_of
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.worker_pool import Work, map_in_order, worker_count
from pgpsam_jax.utils.files import read_record, write_json

SCHEMA = 3
REPORT = "verify.json"
_MANY = 1 << 40  # voxels: always enough work for the requested processes
_CHECKING = Work("checks cases", "--workers")
_CACHE = "verified.json"  # in the cache folder: records of checked cases


def check_cases(
    cases: Sequence[Case],
    table: LabelTable | None,
    *,
    window: Window | None = None,
    workers: int = 0,
) -> Iterable[dict]:
    """Yields the record of each case in order; `workers`: processes, -1 = one per core."""
    count = worker_count(workers, len(cases), _MANY, _CHECKING)
    check = functools.partial(check_case, table=table, window=window)
    limit = array_checks.worker_initializer()
    return map_in_order(check, iter(cases), count, _CHECKING, limit)


def summarize(
    records: Sequence[dict],
    table: LabelTable | None,
    *,
    findings: Iterable[Finding] = (),
    has_grid: bool = True,
    window: Window | None = None,
    **about,
) -> dict:
    """Builds the report of checked cases.

    Args:
        records: from `check_cases`.
        findings: additional ones, of the listing.
        has_grid: False for plain arrays without voxel size and orientation.
        window: of `check_cases`.
        **about: entries to add to the report.
    """
    files = [
        {"case": record["case"], "part": record["part"], "group": record["group"], **file}
        for record in records
        for file in record["files"]
    ]
    order = _order(records, table, has_grid=has_grid)
    relative = window is not None and is_relative(window)
    unlike = outliers.compare(files, table, has_grid=has_grid, relative=relative)
    found = [*findings, *_duplicates(files), *unlike, *_order_findings(order, table)]
    clipped = {file["case"]: file["clipped"] for file in files if "clipped" in file}
    if window is not None and (message := clipping.message(clipped, window)):
        found.append(Finding(WARNING, "cut", "", message))
    if alike := neighbors.check(files):
        found.append(alike)
    by_file = {file["file"]: file for file in files}
    data_set: list[dict[str, str]] = []
    for finding in found:
        record = by_file.get(finding.file)
        (record["findings"] if record else data_set).append(finding.to_json())
    every = [*data_set, *(f for file in files for f in file["findings"])]
    levels = [finding["level"] for finding in every]
    return {
        "schema": SCHEMA,
        **about,
        "label_table": table and table.to_json(),
        "files": files,
        "data_set": data_set,
        "order": order,
        "counts": {
            "files": len(files),
            "cases": len(records),
            "errors": levels.count(ERROR),
            "warnings": levels.count(WARNING),
        },
    }


def _duplicates(files: list[dict]) -> list[Finding]:
    """Reports files with equal voxels: a duplicated patient, or a label of another case."""
    found: list[Finding] = []
    seen: dict[tuple[str, str], dict] = {}
    for file in files:
        content = file.get("content")
        empty = file["kind"] == "label" and set(file.get("voxels", {})) <= {"0"}
        if content is None or empty:
            continue
        first = seen.setdefault((file["kind"], content), file)
        if first is file:
            continue
        leak = first["part"] and file["part"] and first["part"] != file["part"]
        parts = f", one in {first['part']} and one in {file['part']}" if leak else ""
        image = file["kind"] == "image"
        remedy = "keep only one of them" if image else "give each case its own label"
        message = f"has the same voxels as {first['file']}{parts}; {remedy}"
        level = ERROR if image or leak else WARNING
        found.append(Finding(level, "duplicate", file["file"], message))
    return found


def _order(records, table: LabelTable | None, *, has_grid: bool) -> dict:
    described = [{int(i): f for i, f in record["features"].items()} for record in records]
    return check_label_order(described, None if table is None else table.organs, has_grid=has_grid)


def _order_findings(order: dict, table: LabelTable | None) -> list[Finding]:
    if table is None:
        known = f"; the organs match {order['order']}" if order["order"] else ""
        message = (
            f"there is no label table, so label ids have no names{known}; write a JSON file that "
            'names each class, {"classes": [{"name": "spleen", "source": [1]}, ...]}, and set '
            "data.label_table to it"
        )
        return [Finding(ERROR, "no_table", "", message)]
    if order["verdict"] != "mixed_up":
        return []
    named = table.organs
    wrong = [
        f"{i} looks like {organ}, not {named.get(i, 'background')}"
        for i, organ in sorted(order["likely"].items())
        if organ_of(named.get(i, "")) != organ
    ]
    likely = f"; they match {order['order']}" if order["order"] else ""
    message = (
        f"organ positions and sizes contradict the label table{likely}: {', '.join(wrong)}; "
        "correct the table (or the affines, if left and right are swapped)"
    )
    return [Finding(ERROR, "order", "", message)]


def verify_run_data(data, split, workdir, *, say: Callable[[str], None] = print) -> dict | None:
    """Checks the cases of a run before training and writes `<workdir>/verify.json`.

    Records are cached in the cache folder, keyed by file contents, label table and window, so only
    new or changed cases are read and reported.

    Args:
        data: data configuration; `verify=False` skips the checks.
        split: cases of each part, and the label table.
        say: prints a line.

    Returns:
        The report; None if skipped.

    Raises:
        UserError: the data has errors.
    """
    if not data.get("verify", True):
        return None
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    cases = {
        case.case_id: dataclasses.replace(case, part=part)
        for part, members in reversed(parts.items())
        for case in members
    }
    window = window_of(data)
    cache = Path(data.cache_dir or Path(workdir) / "cache") / _CACHE
    cached, records, fresh = _read_cache(cache), [], []
    for case in sorted(cases.values(), key=lambda case: case.case_id):
        key = _key(case, split.table, window)
        if key not in cached:
            cached[key] = check_case(case, split.table, window)
            fresh.append(case.case_id)
        own = {"part": case.part, "group": case.group}
        records.append(json.loads(json.dumps(cached[key])) | own)
    report = summarize(
        records,
        split.table,
        has_grid=data.layout != "transunet",
        window=window,
        root=str(data.root),
        layout=data.layout,
    )
    if fresh:
        _write_cache(cache, cached)
        write_json(Path(workdir) / REPORT, report)
        _print_findings(report, fresh, say)
    if report["counts"]["errors"]:
        first = next(f for f in findings_of(report) if f["level"] == ERROR)
        more = report["counts"]["errors"] - 1
        rest = f" and {more} more" if more else ""
        raise UserError(
            f"the data in {data.root} has errors: {format_finding(first)}{rest} (full list in "
            f"{Path(workdir) / REPORT}; fix them, or set data.verify to False to train anyway)"
        )
    return report


def findings_of(report: dict) -> list[dict]:
    """Returns all findings of a report."""
    return [f for file in report["files"] for f in file["findings"]] + report["data_set"]


def format_finding(finding: dict) -> str:
    """Returns a finding as one line that starts with its file."""
    return f"{finding['file']} {finding['message']}".strip()


def _print_findings(report: dict, fresh: list[str], say) -> None:
    counts = report["counts"]
    say(
        f"checked {len(fresh)} of {counts['cases']} cases: {counts['errors']} errors, "
        f"{counts['warnings']} warnings"
    )
    of_fresh = [f for file in report["files"] if file["case"] in fresh for f in file["findings"]]
    for finding in [*of_fresh, *report["data_set"]][:20]:
        if finding["level"] == WARNING:
            say(f"warning: {format_finding(finding)}")


def _key(case: Case, table: LabelTable, window) -> str:
    sources = [source for source in (case.image, case.label) if source is not None]
    try:
        digests = [volumes.digest(source) for source in sources]
    except OSError as error:
        raise UserError(f"case {case.case_id} cannot be read: {error}; check the files") from error
    names, kind = [str(s) for s in sources], type(window).__name__
    value = [SCHEMA, case.case_id, names, digests, table.to_json(), kind, window]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read_cache(path: Path) -> dict:
    """Reads records by key; empty if the file is missing, damaged or of another schema."""

    def parse(value):
        cases = value["cases"] if value["schema"] == SCHEMA else {}
        complete = all(record.keys() >= {"case", "files", "features"} for record in cases.values())
        return cases if complete else {}

    found = read_record(path, parse, missing={}, damaged=None)
    if found is None:
        warnings.warn(f"{path} is damaged; checking the data again", stacklevel=2)
    return found or {}


def _write_cache(path: Path, records: dict) -> None:
    try:
        write_json(path, {"schema": SCHEMA, "cases": records})
    except OSError as error:  # without the cache, the next run repeats the checks
        warnings.warn(f"{path} cannot be written ({error})", stacklevel=2)
