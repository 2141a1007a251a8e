"""Segment NIfTI files with a trained run, or with SAM and boxes; masks keep the voxel grid.

Organ volumes are printed and written to volumes.csv and predictions.json (which also records the
run behind each mask); labels.json lists the class ids. Masks that this run did not write are
replaced only with --overwrite. Of several runs, the probabilities are averaged.

--boxes prompts the SAM given as --base with a CSV table: file,label,i0,i1,j0,j1,k0,k1, the first
and last voxel of a box along the axes of the file. --boxes-from draws the boxes around labels, and
--truth scores masks: both print Dice per label and write dice.csv.

Examples:
  python -m pgpsam_jax.predict --workdir runs/x --input volume.nii.gz --output masks
  python -m pgpsam_jax.predict --workdir runs/x --input volumes --output masks --overlay
  python -m pgpsam_jax.predict --workdir runs/x --input volumes --output masks --skip-existing
  python -m pgpsam_jax.predict --workdir runs/fold0 runs/fold1 --input volumes --output masks
  python -m pgpsam_jax.predict --base weights/lite_medsam --boxes boxes.csv --input volumes \\
      --output masks
"""

from __future__ import annotations

import argparse
from typing import Any

# NumPy, NiBabel and JAX are imported where they are used, after --help.
from pgpsam_jax.data.io.volume_files import Inputs, find_inputs
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.masks import Masks
from pgpsam_jax.evaluation.prediction import MAPS, by_stem, predict
from pgpsam_jax.runtime.cli import Parser, pair, positive, running
from pgpsam_jax.runtime.malloc import keep_freed_memory
from pgpsam_jax.runtime.worker_pool import check


def main() -> None:
    parser = Parser("pgpsam_jax.predict", __doc__)
    parser.add_argument(
        "--workdir", nargs="+", metavar="RUN", help="folder of a trained run, or of several"
    )
    parser.add_argument("--input", required=True, help="NIfTI file, or folder of NIfTI files")
    parser.add_argument("--output", required=True, help="folder for the masks")
    parser.add_argument(
        "--overlay", action="store_true", help="write a PNG of slices beside each mask"
    )
    for name, what in MAPS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"also write {what}")
    parser.add_argument(
        "--skip-existing", action="store_true", help="keep masks that this run wrote before"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace masks that this run did not write"
    )
    parser.add_argument(
        "--max-gib",
        type=positive,
        help="largest volume to read, in GiB as float32 (reading takes three times as much "
        "memory); default: data.max_gib of the run",
    )
    parser.add_argument(
        "--base", help="converted SAM weights: those of the run, if they have moved, or for boxes"
    )
    boxes = parser.add_argument_group("SAM with boxes, without a run")
    boxes.add_argument("--boxes", metavar="TABLE", help="CSV table of boxes")
    boxes.add_argument(
        "--boxes-from",
        metavar="LABELS",
        help="label file, or folder with a label of the name of each input, to draw boxes around: "
        "an ORACLE",
    )
    boxes.add_argument("--truth", metavar="LABELS", help="with --boxes: labels to score against")
    boxes.add_argument("--label-table", help="JSON file that names the classes of the labels")
    boxes.add_argument(
        "--window",
        type=pair,
        metavar="LOW,HIGH",
        help="intensities to map to 0 and 1, -160,240 for organs in CT; default: percentiles 0.5 "
        "and 99.5 of each volume",
    )
    boxes.add_argument(
        "--widen",
        type=float,
        metavar="PIXELS",
        help="widen boxes on every side; default: 0, with --boxes-from 1",
    )
    boxes.add_argument(
        "--mirrored", action="store_true", help="show SAM the patient's right on the right"
    )
    with running():
        arguments = parser.parse_args()
        _check_flags(arguments)
        from pgpsam_jax.config import default_config, load_config
        from pgpsam_jax.data.io import array_checks
        from pgpsam_jax.data.io.voxel_grid import AXIAL
        from pgpsam_jax.methods.registry import refuse_without_labels

        config = default_config()
        for workdir in arguments.workdir or ():  # cheap checks first
            config = load_config(workdir)
            check(config.eval.workers)
            refuse_without_labels(config.model)
        inputs = find_inputs(arguments.input)
        options = {"overwrite": arguments.overwrite}
        Masks(arguments.output, by_stem(inputs.files), previews=arguments.overlay, **options)
        run = _open(arguments, inputs)
        if arguments.max_gib:
            array_checks.allow(arguments.max_gib)
        failed = predict(
            run.predictor,
            run.label_names,
            inputs,
            arguments.output,
            run=run.identity,
            warnings_of=run.remarks,
            axis=config.data.axis if arguments.workdir else AXIAL,
            overlay=arguments.overlay,
            maps=[name for name in MAPS if getattr(arguments, name)],
            skip_existing=arguments.skip_existing,
            workers=config.eval.workers,
            **options,
        )
        if not arguments.workdir:
            run.write_dice(arguments.output)
        if failed:
            total = len(inputs.files) + len(inputs.faults)
            others = f"; the others are in {arguments.output}" if failed < total else ""
            raise UserError(f"{failed} of {total} files could not be read (see above){others}")


def _check_flags(arguments: argparse.Namespace) -> None:
    """Refuses flags that do not belong together."""
    sources = {"--workdir": "workdir", "--boxes": "boxes", "--boxes-from": "boxes_from"}
    given = [flag for flag, name in sources.items() if getattr(arguments, name)]
    if len(given) != 1:
        found = f", not {' and '.join(given)}" if given else ""
        raise UserError(
            f"give --workdir, a trained run, or --base with --boxes or --boxes-from{found}"
        )
    if arguments.workdir:
        for flag in ("--truth", "--label-table", "--window", "--widen", "--mirrored"):
            if getattr(arguments, flag[2:].replace("-", "_")) not in (None, False):
                raise UserError(f"{flag} is for --boxes; a run has its own settings")
    elif not arguments.base:
        raise UserError(f"{given[0]} needs --base, the converted SAM weights to prompt")
    if arguments.boxes_from and arguments.truth:
        raise UserError("--boxes-from scores against its own labels; leave out --truth")
    for name in MAPS:
        if getattr(arguments, name) and not arguments.workdir:
            raise UserError(f"--{name} needs --workdir: masks of boxes have no probabilities")
    if arguments.skip_existing and (arguments.boxes_from or arguments.truth):
        raise UserError("--skip-existing would leave volumes unscored; leave it out")


def _open(arguments: argparse.Namespace, inputs: Inputs) -> Any:
    """A `TrainedRun`, an `EnsembleRun` or a `BoxRun`."""
    if arguments.workdir:
        from pgpsam_jax.inference.ensemble import load_runs

        return load_runs(arguments.workdir, arguments.base)
    from pgpsam_jax.evaluation.box_prompts import open_box_run

    return open_box_run(
        inputs.files,
        arguments.base,
        output=arguments.output,
        boxes=arguments.boxes,
        truth=arguments.boxes_from or arguments.truth,
        label_table=arguments.label_table,
        window=arguments.window,
        widening=arguments.widen,
        mirrored=arguments.mirrored,
    )


if __name__ == "__main__":
    keep_freed_memory()
    main()
