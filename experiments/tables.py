"""Prints tables of experiment grids and runs.

RUNS are grid folders (finished or not) and run folders. A single run gets its own tables; several
runs whose configurations differ only in seeds form a row, and the first row is the reference. CSV
is in long format: every score of every case, organ, protocol and metric.

Examples:
  python -m experiments.tables runs/table3 --format markdown
  python -m experiments.tables runs/table3 --format csv --output table3.csv
"""

import sys
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.cli import Parser, running
from pgpsam_jax.utils.files import csv_text, write_text


def main(arguments=None) -> None:
    """Entry point; `arguments` replace those of the command line."""
    parser = Parser("experiments.tables", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="grid folders and run folders")
    formats = ("markdown", "latex", "csv")
    parser.add_argument("--format", choices=formats, default="markdown", help="output format")
    parser.add_argument("--output", metavar="FILE", help="write to a file instead of printing")
    with running():
        options = parser.parse_args(arguments)
        text = format_tables(options.runs, options.format)
        if options.output is None:
            sys.stdout.write(text)
        else:
            write_text(options.output, text)
            print(f"wrote {options.output}")


def format_tables(folders, style: str) -> str:
    """Returns the tables of folders as text: style "markdown", "latex" or "csv"."""
    from pgpsam_jax.results.tables import study  # slow: after --help
    from pgpsam_jax.results.tables.assemble import run_tables, study_tables
    from pgpsam_jax.results.tables.text import to_latex, to_markdown

    grids, runs = _read(folders)
    studies = [study.from_grid(grid) for grid in grids]
    studies += [study.from_runs(runs)] if runs else []
    if style == "csv":
        rows = (row for one in studies for row in study.long_rows(one))
        return csv_text(study.LONG_COLUMNS, rows)
    parts = []
    for one in studies:
        alone = one.name == "runs" and len(runs) == 1
        title = f"Run {runs[0].workdir}" if alone else one.title
        tables = run_tables(runs[0]) if alone else study_tables(one)
        write = to_latex if style == "latex" else to_markdown
        heading = f"% {title}; needs \\usepackage{{booktabs}}" if style == "latex" else f"# {title}"
        parts += [" ".join(heading.split()) + "\n", *map(write, tables)]
    return "\n".join(parts)


def _read(folders):
    """Reads the grids and runs of folders, each once."""
    from pgpsam_jax.results.grid import is_grid, read_grid
    from pgpsam_jax.results.runs import read_run

    grids, runs = [], []
    for path in {Path(folder).resolve(): Path(folder) for folder in folders}.values():
        if is_grid(path):
            grids.append(read_grid(path))
        elif (path / "config.json").is_file():
            runs.append(read_run(path))
        else:
            raise UserError(
                f"{path} is neither a grid folder (no grid.json) nor a run folder (no "
                "config.json); give folders written by run_grid or pgpsam_jax.main"
            )
    return grids, runs


if __name__ == "__main__":
    main()
