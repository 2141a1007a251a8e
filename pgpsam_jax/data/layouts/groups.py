"""Groups of cases that belong together, such as several volumes of one person."""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgpsam_jax.data.layouts.cases import Case, case_key, listed
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils import shipped
from pgpsam_jax.utils.files import StrPath
from pgpsam_jax.utils.untrusted_text import read_text, read_user_json, sanitize


def with_groups(cases: Sequence[Case], pattern: str = "", file: StrPath = "") -> list[Case]:
    """Returns the cases with their groups; unchanged without pattern and file.

    Args:
        cases: of one data set.
        pattern: regular expression, searched in the case id; its capture group is the case's group.
        file: of `read_groups`.

    Raises:
        UserError: the pattern is not valid, or a case has no group.
    """
    if not (pattern or file):
        return list(cases)
    if file:
        of_case = read_groups(file)
        found = [of_case.get(case_key(case.case_id)) for case in cases]
        lacks, remedy = f"group file {file} does not name", "add them to it"
    else:
        expression = _compile(pattern)
        matches = [expression.search(case.case_id) for case in cases]
        found = [match[1] if match else None for match in matches]
        lacks = f"data.group {pattern!r} does not match"
        remedy = "correct it, or list the groups in data.group_file"
    missing = [case.case_id for case, group in zip(cases, found, strict=True) if not group]
    if missing:
        raise UserError(f"{lacks} the case(s) {listed(missing)}; {remedy}")
    return [
        dataclasses.replace(case, group=group or "")
        for case, group in zip(cases, found, strict=True)
    ]


def read_groups(file: StrPath) -> dict[str, str]:
    """Reads the group of each case, by `cases.case_key`.

    Args:
        file: a JSON object {case id: group}, or a CSV file with the columns `case` and `group`; a
            shipped one goes by its path from the repository, `configs/labels/NAME.csv`.
    """
    path = shipped.find(file)
    pairs = _csv(path) if Path(path).suffix.lower() == ".csv" else _json(path)
    groups: dict[str, str] = {}
    for case, group in pairs:
        if groups.setdefault(key := case_key(case), group) != group:
            raise UserError(
                f"group file {file} puts case {sanitize(case)} into the groups "
                f"{sanitize(groups[key])} and {sanitize(group)}; keep one"
            )
    return groups


def check_parts(parts: Mapping[str, Sequence[Case]], split: str) -> None:
    """Refuses a split with cases of one group in several parts."""
    part_of: dict[str, tuple[str, Case]] = {}
    for part, cases in parts.items():
        for case in cases:
            other, first = part_of.setdefault(case.group, (part, case))
            if case.group and other != part:
                raise UserError(
                    f"split {split} has group {sanitize(case.group)} in {other} (case "
                    f"{first.case_id}) and in {part} (case {case.case_id}), which leaks; set "
                    "data.split=group, or correct the split or the groups"
                )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f"data.group {pattern!r} is no regular expression ({error}); correct it"
        ) from None
    if expression.groups != 1:
        raise UserError(
            f"data.group {pattern!r} has {expression.groups} capture groups; give one, around the "
            "part of the case id that names the group, such as '(patient[0-9]+)'"
        )
    return expression


def _csv(path: Path) -> list[tuple[str, str]]:
    text = read_text(path, "group file")
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:
        raise UserError(f"group file {path} cannot be read as CSV: {error}; correct it") from None
    if not rows or rows[0] != ["case", "group"]:
        raise UserError(f"group file {path} must start with the line case,group")
    for row in rows[1:]:
        if len(row) != 2 or not all(row):
            raise UserError(
                f"group file {path} has the line {sanitize(','.join(row), 60)!r}; each must be "
                "CASE,GROUP"
            )
    return [(case, group) for case, group in rows[1:]]


def _json(path: Path) -> list[tuple[str, str]]:
    value = read_user_json(path, "group file")
    if not isinstance(value, dict) or not all(
        type(group) in (str, int) and str(group) for group in value.values()
    ):
        raise UserError(f'group file {path} must be {{"CASE": "GROUP", ...}}')
    return [(case, str(group)) for case, group in value.items()]
