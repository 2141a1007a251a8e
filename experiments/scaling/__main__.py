"""Studies how the training step scales: measured on local devices, or compiled for TPUs.

`measured` times the real step on increasing numbers of devices, in weak scaling (constant batch per
device) and strong scaling (constant global batch). `compiled` compiles it for TPU topologies
without a TPU (pip install '.[tpu]') and reports memory, FLOPs and collectives per chip and a
roofline estimate. `render` rewrites tables and charts from the CSV files of a folder.

Each combination of the lists is a point and runs in a fresh process; a failed point is a row with
its reason. The same command again measures the missing points.

Examples:
  python -m experiments.scaling measured --encoders vit_b --batches 8
  python -m experiments.scaling measured --simulate 4 --encoders vit_t --sizes 128 --batches 2
  python -m experiments.scaling compiled --topologies v5e:2x2,v5p:8x8x8 --encoders vit_b,vit_h
  python -m experiments.scaling compiled --topologies v5e:2x2 --fit --remat none,blocks
  python -m experiments.scaling render runs/scaling
"""

import functools
import sys

from experiments.measurement import flags
from experiments.measurement.csv_table import FAILED
from experiments.measurement.flags import words
from experiments.measurement.points import cross
from experiments.measurement.study import Study
from experiments.measurement.worker_process import Failed
from experiments.scaling import points
from experiments.scaling.kinds import COMPILED, MEASURED
from experiments.scaling.render import render, render_all
from experiments.scaling.study import compile_with, fit, local_devices, measure_with
from pgpsam_jax.errors import UserError
from pgpsam_jax.runtime.cli import Parser, running


def main(arguments: list[str] | None = None) -> int:
    """Runs or renders a study; returns 1 if a point failed, else 0."""
    with running():
        options = _parser().parse_args(arguments)
        if options.command == "render":
            for text in render_all(options.folder):
                print(text)
            return 0
        if options.limit <= 0 or getattr(options, "workers", 1) < 1:
            raise UserError("--limit (seconds) and --workers (points at a time) must be 1 or more")
        asked = (_measured if options.command == "measured" else _compiled)(options)
        kind = MEASURED if options.command == "measured" else COMPILED
        render(options.output, kind)
        print(f"{options.output}/{kind.name}.csv, .md and charts: {len(asked)} points")
    return int(any(row["status"] == FAILED for row in asked))


def _measured(options) -> list[dict]:
    effort = flags.effort_of(options)
    if options.simulate < 0:
        raise UserError("--simulate is a number of devices; give 1 or more")
    try:
        there = local_devices(options.simulate, options.limit)
    except Failed as failure:
        raise UserError(
            f"no devices to measure on: {failure}; check the installation of JAX"
        ) from None
    dtype = options.dtype or ("float32" if there["platform"] == "cpu" else "bfloat16")
    chosen = points.measured_points(
        there["count"],
        flags.numbers("--devices", options.devices) if options.devices else [],
        words(options.scaling),
        bool(options.simulate),
        **_lists(options, dtype),
    )
    study = Study(options.output, MEASURED, measure_with(options.limit, effort), options.retry)
    return study.each(study.row, chosen)


def _compiled(options) -> list[dict]:
    lists = _lists(options, options.dtype or "bfloat16") | {"topology": words(options.topologies)}
    chosen = cross(points.Compiled, **lists | ({"batch": [1]} if options.fit else {}))
    study = Study(options.output, COMPILED, compile_with(options.limit), options.retry)
    find = functools.partial(fit, study) if options.fit else study.row
    return study.each(find, chosen, options.workers)


def _lists(options, dtype: str) -> dict:
    """Returns the values of the fields that both kinds of points share."""
    return flags.point_lists(options) | {"mesh": words(options.meshes), "dtype": [dtype]}


def _parser() -> Parser:
    parser = Parser("experiments.scaling", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measured", help="time the step on the local devices")
    compiled = commands.add_parser("compiled", help="compile the step for TPU topologies")
    again = commands.add_parser("render", help="rewrite tables and charts from the CSV files")
    again.add_argument("folder")
    for command in (measured, compiled):
        flags.add_point_flags(command, "runs/scaling")
        add = command.add_argument
        add(
            "--meshes",
            default="data",
            help="axes joined by +, with a size or taking the rest: data,fsdp,tensor4,fsdp+tensor2",
        )
        add("--dtype", default="", help="bfloat16; float32 is the default on CPUs")
        add("--limit", type=float, default=900.0, help="seconds per point, at most")
        add("--retry", action="store_true", help="retry failed points")
    flags.add_effort_flags(measured)
    add = measured.add_argument
    add("--devices", default="", help="numbers of devices; empty: powers of two and all")
    add("--scaling", default="weak,strong", help="weak, strong")
    add("--simulate", type=int, default=0, metavar="N", help="N devices on this CPU")
    add = compiled.add_argument
    add("--topologies", default=",".join(points.TOPOLOGIES), help="chip and shape, v5e:4x4")
    add("--workers", type=int, default=1, help="points at a time")
    add("--fit", action="store_true", help="search for the largest batch that fits")
    return parser


if __name__ == "__main__":
    sys.exit(main())
