"""Measures speed and memory of the model on this machine: steps, their parts, and PyTorch.

Each combination of the lists is a point. A point runs in a fresh process; a failed point is a row
with its reason. The folder holds `benchmark.csv` and `benchmark.md`, written after each point: the
same command again measures the missing points.

Examples:
  python -m experiments.benchmark --tasks training,inference --batches 1,2
  python -m experiments.benchmark --encoders vit_b,vit_l --sizes 512,1024 --dtypes bfloat16
  python -m experiments.benchmark --tasks training --against torch
  python -m experiments.benchmark --tasks scoring,startup
  python -m experiments.benchmark --tasks encoded_flops --models autosam,samlst,surgicalsam
  python -m experiments.benchmark --suite gpu --output runs/benchmark_gpu
"""

import functools
import sys
from argparse import Namespace
from pathlib import Path

from experiments.benchmark.points import SUITES, Point, cross, with_ceilings
from experiments.benchmark.runner import measure
from experiments.benchmark.table import BENCHMARK, markdown
from experiments.measurement import flags
from experiments.measurement.csv_table import OK
from experiments.measurement.flags import words
from experiments.measurement.study import Study
from pgpsam_jax.runtime.cli import Parser, running
from pgpsam_jax.utils.files import write_text


def main(arguments: list[str] | None = None) -> int:
    """Measures the points of the command line; returns 1 if one failed, else 0."""
    with running():
        options = _parser().parse_args(arguments)
        points = with_ceilings(points_of(options))
        timed = functools.partial(measure, effort=flags.effort_of(options))
        study = Study(options.output, BENCHMARK, timed, retry=True)
        for i, point in enumerate(points, start=1):
            if study.is_missing(point):
                print(f"[{i}/{len(points)}] ", end="")
                study.row(point)
                write_text(Path(options.output, "benchmark.md"), markdown(study.rows.values()))
        rows = [study.rows[point.key] for point in points]
        print(markdown(rows))
    return int(any(row["status"] != OK for row in rows))


def points_of(options: Namespace) -> list[Point]:
    """Returns the points of a suite, or of the cross product of the lists."""
    if options.suite:
        return SUITES[options.suite]()
    return cross(
        task=words(options.tasks),
        model=words(options.models or ("sam" if options.against else "pgpsam")),
        dtype=words(options.dtypes),
        against=[options.against],
        **flags.point_lists(options),
    )


def _parser() -> Parser:
    parser = Parser("experiments.benchmark", __doc__)
    flags.add_point_flags(parser, "runs/benchmark")
    add = parser.add_argument
    add(
        "--tasks",
        default="encoder,inference,training",
        help="encoder, inference, training; matmul, scoring, startup, loop, run; encoded and "
        "encoded_flops, both for --models autosam,samlst,surgicalsam",
    )
    add("--models", default="", help="pgpsam (default), sam (default with --against)")
    add("--dtypes", default="float32", help="float32, bfloat16")
    add("--against", default="", help="torch: alternate with the same step in PyTorch")
    add("--suite", default="", choices=("", *SUITES), help="replaces the flags above")
    flags.add_effort_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
