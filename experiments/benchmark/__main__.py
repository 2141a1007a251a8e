"""Measures speed and memory of the model on this machine: steps, their parts, and PyTorch.

Each combination of the lists is a point. A point runs in a fresh process; a failed point is a row
with its reason. The folder holds `benchmark.json` and `benchmark.md`, written after each point: the
same command again measures the missing points.

Examples:
  python -m experiments.benchmark --tasks training,inference --batches 1,2
  python -m experiments.benchmark --encoders vit_b,vit_l --sizes 512,1024 --dtypes bfloat16
  python -m experiments.benchmark --tasks training --against torch
  python -m experiments.benchmark --tasks scoring,startup
  python -m experiments.benchmark --tasks encoded_flops --models autosam,samlst,surgicalsam
  python -m experiments.benchmark --suite gpu --output runs/benchmark_gpu
"""

import sys
from argparse import Namespace

from experiments.benchmark import table
from experiments.benchmark.points import SUITES, Point, cross, with_ceilings
from experiments.benchmark.runner import measure
from experiments.measurement.flags import numbers, words
from experiments.measurement.timing import Effort
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.cli import Parser, running


def main(arguments: list[str] | None = None) -> int:
    """Measures the points of the command line; returns 1 if one failed, else 0."""
    with running():
        options = _parser().parse_args(arguments)
        points = with_ceilings(points_of(options))
        if options.steps < 1:
            raise UserError("--steps is the number of timed steps; give 1 or more")
        effort, rows = Effort(options.steps, options.budget), table.load(options.output)
        table.store(options.output, rows)  # fails now if the folder cannot be written
        for i, point in enumerate(points, start=1):
            if table.finished(rows.get(point.key)):
                continue
            print(f"[{i}/{len(points)}] {point.key}", flush=True)
            rows[point.key] = row = measure(point, effort)
            table.store(options.output, rows)
            if "error" in row:
                print(f"  failed: {row['error']}", flush=True)
        asked = {point.key: rows[point.key] for point in points}
        print(table.markdown(list(asked.values())))
    return int(any("error" in row for row in asked.values()))


def points_of(options: Namespace) -> list[Point]:
    """Returns the points of a suite, or of the cross product of the lists."""
    if options.suite:
        return SUITES[options.suite]()
    return cross(
        task=words(options.tasks),
        model=words(options.models or ("sam" if options.against else "pgpsam")),
        encoder=words(options.encoders),
        image_size=numbers("--sizes", options.sizes),
        dtype=words(options.dtypes),
        attention=words(options.attention),
        remat=words(options.remat),
        scan=[options.scan],
        batch_size=numbers("--batches", options.batches),
        against=[options.against],
    )


def _parser() -> Parser:
    parser = Parser("experiments.benchmark", __doc__)
    add = parser.add_argument
    add(
        "--tasks",
        default="encoder,inference,training",
        help="encoder, inference, training; matmul, scoring, startup, loop, run; encoded and "
        "encoded_flops, both for --models autosam,samlst,surgicalsam",
    )
    add("--models", default="", help="pgpsam (default), sam (default with --against)")
    add("--encoders", default="vit_b", help="vit_t, vit_b, vit_l, vit_h")
    add("--sizes", default="512", help="image sizes in pixels")
    add("--batches", default="1", help="batch sizes")
    add("--dtypes", default="float32", help="float32, bfloat16")
    add("--attention", default="", help="attention backends; empty: default of config.model")
    add("--remat", default="", help="recomputation policies; empty: default of config.model")
    add("--scan", action="store_true", help="model.scan_blocks")
    add("--against", default="", help="torch: alternate with the same step in PyTorch")
    add(
        "--suite",
        default="",
        choices=("", *SUITES),
        help="replaces the flags above",
    )
    add("--steps", type=int, default=50, help="timed steps per point, at most")
    add(
        "--budget",
        type=float,
        default=30.0,
        help="on a CPU: seconds per point after which five steps are enough",
    )
    add("--output", default="runs/benchmark", help="folder of the results")
    return parser  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
