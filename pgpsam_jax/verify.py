"""Check a data set before training: every file, one line each, and what is wrong with it.

Ends with 0 if there are no errors (warnings there may be), 1 if there are, 2 if nothing could be
checked. `--report FILE` writes what was found as JSON (`data/verification.py` says in which form;
`passed_over` counts what in the folders is no data).

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
from pathlib import Path

from pgpsam_jax.data.findings import ERROR, WARNING
from pgpsam_jax.data.io import array_checks
from pgpsam_jax.data.io.array_files import NO_GRID
from pgpsam_jax.data.layouts import find
from pgpsam_jax.data.layouts.cases import Listing
from pgpsam_jax.data.layouts.label_table import LabelTable, load_label_table
from pgpsam_jax.data.layouts.split import split_cases
from pgpsam_jax.data.quality.verification import check_cases, findings_of, spoken, summarise
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.cli import Parser, pair, positive, running
from pgpsam_jax.utils.files import write_json
from pgpsam_jax.utils.untrusted_text import read_user_json, sanitize

# Fields of `config.data`; short names count only where they are no part of a path.
_SETTINGS = re.compile(
    r"\bdata\.(?P<name>layout|image_glob|label_glob|label_table|split_file|split|window)\b"
    r"|(?<![\w/.'\"-])(?P<short>image_glob|label_glob|label_table|split_file)(?![\w/.'\"-])"
)
_LONGEST = 4000  # characters of a line


def verify(
    root,
    layout: str = "auto",
    *,
    image_glob: str | None = None,
    label_glob: str | None = None,
    table: LabelTable | None = None,
    split: str | None = None,
    split_file=None,
    window: tuple[float, float] | None = None,
    workers: int = 0,
    say=print,
) -> dict:
    """Check all files of a data set, saying a line for each; returns the report.

    `split` and `split_file` as in `data`: where given, no patient may be in two of its parts.
    """
    started, base = time.perf_counter(), Path(root)

    def tell(line: str) -> None:  # names of files are untrusted too
        say(sanitize(spelled(line), _LONGEST))

    if layout == "auto":
        layout = find.detect(root, image_glob)
    listing = find.scan(layout, root, image_glob, label_glob)
    table = table or find.label_table(layout, root)
    if split:
        _split(listing, split, split_file)
    of_file = {}
    for finding in listing.findings:
        of_file.setdefault(finding.file, []).append(finding)
    records, said = [], set()
    for record in check_cases(listing.cases, table, window=window, workers=workers):
        records.append(record)
        for file in record["files"]:
            file["findings"] += [f.to_json() for f in of_file.pop(file["file"], ())]
            said |= {id(finding) for finding in file["findings"]}
            tell(_line(file, base))
    rest = [finding for findings in of_file.values() for finding in findings]
    if layout == "transunet":
        say(f"note     {NO_GRID}")
    for line in listing.passed_over:
        tell(f"note     {line}")
    report = summarise(
        records,
        table,
        findings=rest,
        has_grid=layout != "transunet",
        root=str(root),
        layout=layout,
        passed_over=listing.passed_over,
    )
    for finding in findings_of(report):
        if id(finding) not in said:
            tell(f"{finding['level']:8} {_short(spoken(finding), base)}")
    say(_order_line(report["order"]))
    counts, seconds = report["counts"], time.perf_counter() - started
    say(
        f"{counts['files']} files of {counts['cases']} cases in {seconds:.1f} s: "
        f"{counts['errors']} errors, {counts['warnings']} warnings"
    )
    return report | {"seconds": round(seconds, 2)}


def _split(listing: Listing, kind: str, file) -> None:
    """Write the parts of a split into the cases; one that does not fit is a finding."""
    cases = [case for case in listing.cases if case.label is not None]
    try:
        parts = split_cases(cases, kind, file=file)
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


def _line(file: dict, base: Path) -> str:
    """The line of a file: how it is, its name, its shape or what is wrong with it."""
    levels = {finding["level"] for finding in file["findings"]}
    level = ERROR if ERROR in levels else WARNING if levels else "ok"
    text = "; ".join(finding["message"] for finding in file["findings"])
    if not text:
        text = " x ".join(map(str, file["shape"]))
        text += f" voxels of {' x '.join(f'{s:.4g}' for s in file['spacing'])} mm"
    return f"{level:8} {_short(file['file'], base)}: {_short(text, base)}"


def _short(text: str, base: Path) -> str:
    """Paths as seen from the data folder."""
    return text.replace(f"{base}{os.sep}", "") if str(base) != "." else text


def _order_line(order: dict) -> str:
    looks = f" The ids look like {order['order']}." if order["order"] else ""
    return {
        "consistent": "label order: the organs lie as the label table says.",
        "mixed_up": f"label order: NOT as the label table says.{looks}",
        "guess": f"label order: no label table.{looks}",
        "unclear": "label order: cannot be told (it takes three organs of the abdomen that lie as "
        "in a CT of an adult).",
    }[order["verdict"]]


def main(arguments=None) -> int:
    parser = Parser("pgpsam_jax.verify", __doc__)
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument(
        "--layout", default="auto", choices=["auto", *find.LAYOUTS], help="how its files lie"
    )
    parser.add_argument("--image-glob", help="layout pairs: such as images/*.nii.gz")
    parser.add_argument("--label-glob", help="layout pairs: such as labels/*.nii.gz")
    parser.add_argument("--label-table", help="JSON file that names the classes")
    parser.add_argument("--split", help="as data.split: btcv_18_12, btcv_18_6_6, given, file")
    parser.add_argument("--split-file", help="JSON lists of case ids, for --split file")
    parser.add_argument("--report", help="write what was found as JSON")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes; 0 = this one, -1 = one per core"
    )
    parser.add_argument(
        "--window",
        type=pair,
        metavar="LOW,HIGH",
        help="as data.window: intensities that a run tells apart, such as -125,275",
    )
    parser.add_argument(
        "--max-gib",
        type=positive,
        default=array_checks.MAX_GIB,
        help="largest volume, as float32, that is read, in three times as much memory",
    )
    with running(), _flags_named():
        given = parser.parse_args(arguments)
        if given.report:
            _refuse_other(Path(given.report))
        array_checks.allow(given.max_gib)
        report = verify(
            given.data,
            given.layout,
            image_glob=given.image_glob,
            label_glob=given.label_glob,
            table=load_label_table(given.label_table) if given.label_table else None,
            split="file" if given.split_file else given.split,
            split_file=given.split_file,
            window=given.window,
            workers=given.workers,
        )
        if given.report:
            try:
                write_json(given.report, report)
            except OSError as error:
                raise UserError(
                    f"report {given.report} cannot be written: {error.strerror or error}"
                ) from error
            print(f"report in {given.report}")
        return 1 if report["counts"]["errors"] else 0


def spelled(text: str) -> str:
    """A message with settings of a run's configuration named as the flags of this command."""
    return _SETTINGS.sub(
        lambda found: f"--{(found['name'] or found['short']).replace('_', '-')}", text
    )


@contextlib.contextmanager
def _flags_named():
    try:
        yield
    except UserError as error:
        raise UserError(spelled(str(error))) from error


def _refuse_other(path: Path) -> None:
    """A `UserError` where a report would take the place of another file."""
    if path.is_dir():
        raise UserError(f"--report {path} is a folder; name a file in it")
    if not path.exists():
        place = next(folder for folder in path.absolute().parents if folder.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise UserError(f"--report {path} cannot be written: {place} does not take files")
        return
    try:
        there = read_user_json(path, "report")
    except UserError:
        there = None
    if not (isinstance(there, dict) and {"schema", "files", "counts"} <= there.keys()):
        raise UserError(
            f"--report {path} is there and is no report of verify; give another name, or remove it"
        )


if __name__ == "__main__":
    sys.exit(main())
