"""Check a data set before training: prints one line per file with its findings.

Exit status: 0 without errors (warnings allowed), 1 with errors, 2 if nothing could be checked.
`--report FILE` writes the report as JSON (format: `data/quality/verification.py`; `skipped`
counts files in the folders that are not data).

Examples:
  python -m pgpsam_jax.verify --data datasets/BTCV
  python -m pgpsam_jax.verify --data datasets/BTCV --split btcv_18_12 --report verify.json
  python -m pgpsam_jax.verify --data datasets/mine --image-glob 'images/*.nii.gz' \\
      --label-glob 'labels/*.nii.gz' --label-table datasets/mine/table.json --window -125,275
"""

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# NiBabel and SciPy are imported where they are used, after --help.
from pgpsam_jax.data.findings import ERROR, WARNING, Finding
from pgpsam_jax.data.io import array_checks
from pgpsam_jax.data.io.array_files import NO_GRID
from pgpsam_jax.data.layouts import find, groups
from pgpsam_jax.data.layouts.cases import Listing
from pgpsam_jax.data.layouts.label_table import LabelTable, load_label_table
from pgpsam_jax.data.layouts.split import split_cases
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.cli import Parser, pair, positive, running
from pgpsam_jax.utils.files import StrPath, write_json
from pgpsam_jax.utils.untrusted_text import read_user_json, sanitize

# Fields of `config.data`; names without `data.` match only outside paths.
_SETTINGS = re.compile(
    r"\bdata\.(?P<name>layout|image_glob|label_glob|label_table|split_file|split|group_file"
    r"|group|window)\b"
    r"|(?<![\w/.'\"-])(?P<short>image_glob|label_glob|label_table|split_file)(?![\w/.'\"-])"
)
_MAX_LINE = 4000  # characters


def verify(
    root: StrPath,
    layout: str = "auto",
    *,
    image_glob: str | None = None,
    label_glob: str | None = None,
    table: LabelTable | None = None,
    split: str | None = None,
    split_file: StrPath | None = None,
    group: str = "",
    group_file: StrPath = "",
    window: tuple[float, float] | None = None,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Checks all files of a data set and prints one line per file.

    Args:
        root: folder of the data set.
        layout: one of `find.LAYOUTS`, or "auto" to detect it.
        image_glob, label_glob: file patterns of the layout "pairs".
        table: label table; by default that of the layout.
        split, split_file, group, group_file: as in the data configuration; reports patients and
            groups in more than one part.
        window: intensities (low, high) that a run maps to [0, 1].
        workers: processes; 0 = this one, -1 = one per core.
        say: prints a line.

    Returns:
        The report (see `data.quality.verification`) with `skipped` and `seconds`.
    """
    from pgpsam_jax.data.quality import verification

    started, base = time.perf_counter(), Path(root)

    def emit(line: str) -> None:  # file names are untrusted too
        say(sanitize(with_flag_names(line), _MAX_LINE))

    if layout == "auto":
        layout = find.detect(root, image_glob)
    listing = find.scan(layout, root, image_glob, label_glob)
    table = table or find.label_table(layout, root)
    if group or group_file or split:
        _split(listing, split, split_file, group, group_file)
    of_file: dict[str, list[Finding]] = {}
    for finding in listing.findings:
        of_file.setdefault(finding.file, []).append(finding)
    records, printed = [], set()
    for record in verification.check_cases(listing.cases, table, window=window, workers=workers):
        records.append(record)
        for file in record["files"]:
            file["findings"] += [f.to_json() for f in of_file.pop(file["file"], ())]
            printed |= {id(finding) for finding in file["findings"]}
            emit(_line(file, base))
    rest = [finding for findings in of_file.values() for finding in findings]
    if layout == "transunet":
        say(f"note     {NO_GRID}")
    for line in listing.skipped:
        emit(f"note     {line}")
    report = verification.summarize(
        records,
        table,
        findings=rest,
        has_grid=layout != "transunet",
        window=window,
        root=str(root),
        layout=layout,
        skipped=listing.skipped,
    )
    for entry in verification.findings_of(report):
        if id(entry) not in printed:
            emit(f"{entry['level']:8} {_relative(verification.format_finding(entry), base)}")
    say(_order_line(report["order"]))
    counts, seconds = report["counts"], time.perf_counter() - started
    say(
        f"{counts['files']} files of {counts['cases']} cases in {seconds:.1f} s: "
        f"{counts['errors']} errors, {counts['warnings']} warnings"
    )
    return report | {"seconds": round(seconds, 2)}


def _split(
    listing: Listing, kind: str | None, file: StrPath | None, group: str, group_file: StrPath
) -> None:
    """Assigns each case its group and part of the split; invalid ones are a finding."""
    try:
        listing.cases = groups.with_groups(listing.cases, group, group_file)
        if not kind:
            return
        parts = split_cases([c for c in listing.cases if c.label is not None], kind, file=file)
    except UserError as error:
        listing.add("split", "", str(error))
        return
    part_of = {
        case.case_id: name
        for name, part in zip(("train", "validation", "test"), parts, strict=True)
        for case in part
    }
    listing.cases = [
        dataclasses.replace(case, part=part_of.get(case.case_id, "")) for case in listing.cases
    ]


def _line(file: dict[str, Any], base: Path) -> str:
    """Formats the line of a file: level, name, and its findings or else its shape."""
    levels = {finding["level"] for finding in file["findings"]}
    level = ERROR if ERROR in levels else WARNING if levels else "ok"
    text = "; ".join(finding["message"] for finding in file["findings"])
    if not text:
        text = " x ".join(map(str, file["shape"]))
        text += f" voxels of {' x '.join(f'{s:.4g}' for s in file['spacing'])} mm"
    return f"{level:8} {_relative(file['file'], base)}: {_relative(text, base)}"


def _relative(text: str, base: Path) -> str:
    """Makes paths relative to the data folder."""
    return text.replace(f"{base}{os.sep}", "") if str(base) != "." else text


def _order_line(order: dict[str, str]) -> str:
    looks = f" The ids match {order['order']}." if order["order"] else ""
    return {
        "consistent": "label order: organ positions match the label table.",
        "mixed_up": f"label order: organ positions do NOT match the label table.{looks}",
        "guess": f"label order: no label table.{looks}",
        "unclear": "label order: not determined (needs at least three abdominal organs, placed as "
        "in an adult CT).",
    }[order["verdict"]]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("pgpsam_jax.verify", __doc__)
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument(
        "--layout", default="auto", choices=["auto", *find.LAYOUTS], help="file organization"
    )
    parser.add_argument("--image-glob", help="layout pairs: image files, e.g. images/*.nii.gz")
    parser.add_argument("--label-glob", help="layout pairs: label files, e.g. labels/*.nii.gz")
    parser.add_argument("--label-table", help="JSON file that names the classes")
    parser.add_argument("--split", help="like data.split: btcv_18_12, btcv_18_6_6, given or file")
    parser.add_argument("--split-file", help="JSON lists of case ids; implies --split file")
    parser.add_argument("--group", default="", help="like data.group: part of the case id, a regex")
    parser.add_argument("--group-file", default="", help="like data.group_file")
    parser.add_argument("--report", help="JSON file to write the report to")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes; 0 = this one, -1 = one per core"
    )
    parser.add_argument(
        "--window",
        type=pair,
        metavar="LOW,HIGH",
        help="like data.window: intensities that a run maps to [0, 1], e.g. -125,275",
    )
    parser.add_argument(
        "--max-gib",
        type=positive,
        default=array_checks.MAX_GIB,
        help="largest volume (as float32) to read; reading takes three times as much memory",
    )
    with running(), _errors_with_flag_names():
        given = parser.parse_args(arguments)
        if given.report:
            _check_report_path(Path(given.report))
        array_checks.allow(given.max_gib)
        report = verify(
            given.data,
            given.layout,
            image_glob=given.image_glob,
            label_glob=given.label_glob,
            table=load_label_table(given.label_table) if given.label_table else None,
            split="file" if given.split_file else given.split,
            split_file=given.split_file,
            group=given.group,
            group_file=given.group_file,
            window=given.window,
            workers=given.workers,
        )
        if given.report:
            try:
                write_json(given.report, report)
            except OSError as error:
                raise UserError(
                    f"report {given.report} cannot be written ({error.strerror or error}); "
                    "give a writable path"
                ) from error
            print(f"report in {given.report}")
        return 1 if report["counts"]["errors"] else 0


def with_flag_names(text: str) -> str:
    """Replaces configuration names in a message (`data.window`) by flags (`--window`)."""
    return _SETTINGS.sub(
        lambda found: f"--{(found['name'] or found['short']).replace('_', '-')}", text
    )


@contextlib.contextmanager
def _errors_with_flag_names() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(with_flag_names(str(error))) from error


def _check_report_path(path: Path) -> None:
    """Raises `UserError` if a report cannot be written or would overwrite another file."""
    if path.is_dir():
        raise UserError(f"--report {path} is a folder; give a file in it")
    if not path.exists():
        place = next(folder for folder in path.absolute().parents if folder.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise UserError(
                f"--report {path} cannot be written: {place} is not writable; give another path"
            )
        return
    try:
        there = read_user_json(path, "report")
    except UserError:
        there = None
    if not (isinstance(there, dict) and {"schema", "files", "counts"} <= there.keys()):
        raise UserError(
            f"--report {path} exists and is not a report of verify; give another name, or remove it"
        )


if __name__ == "__main__":
    sys.exit(main())
