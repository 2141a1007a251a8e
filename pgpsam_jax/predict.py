"""Segment NIfTI files with a trained run, or with SAM and boxes; masks keep the voxel grid.

Organ volumes are printed and written to volumes.csv and predictions.json (which also records the
run behind each mask); labels.json lists the class ids. Masks that this run did not write are
replaced only with --overwrite.

--boxes prompts the SAM given as --base with a CSV table: file,label,i0,i1,j0,j1,k0,k1, the first
and last voxel of a box along the axes of the file. --boxes-from draws the boxes around labels, and
--truth scores masks: both print Dice per label and write dice.csv.

Examples:
  python -m pgpsam_jax.predict --workdir runs/x --input volume.nii.gz --output masks
  python -m pgpsam_jax.predict --workdir runs/x --input volumes --output masks --overlay
  python -m pgpsam_jax.predict --workdir runs/x --input volumes --output masks --skip-existing
  python -m pgpsam_jax.predict --base weights/lite_medsam --boxes boxes.csv --input volumes \\
      --output masks
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# NumPy, NiBabel and JAX are imported where they are used, after --help.
from pgpsam_jax.data.io.volume_files import Inputs, find_inputs, stem_of
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.masks import VOLUMES, Masks
from pgpsam_jax.runtime.cli import Parser, pair, positive, running
from pgpsam_jax.runtime.malloc import keep_freed_memory
from pgpsam_jax.runtime.worker_pool import check, map_ahead, map_in_order, worker_count
from pgpsam_jax.utils.files import StrPath
from pgpsam_jax.utils.untrusted_text import sanitize

if TYPE_CHECKING:
    from pgpsam_jax.data.io.nifti import Volume
    from pgpsam_jax.inference.box_prompts import BoxPredictor
    from pgpsam_jax.inference.predictor import Predictor

_LONGEST = 2000  # characters of a line


def predict(
    predictor: Predictor | BoxPredictor,
    names: Sequence[str],
    inputs: Inputs,
    output: StrPath,
    *,
    run: Mapping[str, str],
    overlay: bool = False,
    skip_existing: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    warnings_of: Callable[[Volume], Iterable[str]] = lambda volume: (),
    axis: str = "axial",
) -> int:
    """Writes `<output>/<name>.nii.gz` for each input; unreadable files are reported and skipped.

    Args:
        predictor: `Predictor` of the run, or a `BoxPredictor`.
        names: K class names, background first.
        inputs: files to segment.
        output: folder of the masks.
        run: `TrainedRun.identity`, recorded with the masks.
        overlay: write a contact sheet beside each mask.
        skip_existing: keep masks that this run wrote before.
        overwrite: replace masks of other runs and files that no run wrote (see `Masks`).
        workers: processes that write masks while the next volume is predicted, as in `evaluate`.
        warnings_of: returns sentences about oddities of an input, printed and recorded.
        axis: slice axis, one of `voxel_grid.AXES`.

    Returns:
        The number of files that failed.
    """
    from tqdm import tqdm

    from pgpsam_jax.evaluation.outputs import PredictedVolume, write_prediction

    started, output = time.perf_counter(), Path(output)
    masks = Masks(output, by_stem(inputs.files), previews=overlay, overwrite=overwrite)
    masks.claim(run, names)
    if inputs.skipped:
        tqdm.write(inputs.skipped)
    for fault in inputs.faults:
        _print_line(f"error: {fault}")
    read = functools.partial(_read, axis=axis)
    failed, total = len(inputs.faults), len(inputs.files)
    warned: dict[str, list[str]] = {}
    there = set(masks.done()) if skip_existing else set()
    files = [path for path in inputs.files if stem_of(path) not in there]
    masks.begin([stem_of(path) for path in files])

    def predicted() -> Iterator[PredictedVolume]:
        nonlocal failed
        progress = tqdm(files, desc="predicting", unit="volume")
        for path, volume in zip(progress, map_ahead(read, files), strict=True):
            if isinstance(volume, UserError):
                _print_line(f"error: {volume}")
                failed += 1
                continue
            warned[stem_of(path)] = list(warnings_of(volume))
            for text in warned[stem_of(path)]:
                _print_line(f"warning: {path.name}: {text}")
            image = volume.array if overlay else None
            try:
                ids = predictor(volume)
            except UserError as error:  # its boxes or its label
                _print_line(f"error: {error}")
                failed += 1
                warned.pop(stem_of(path))
                continue
            yield PredictedVolume(stem_of(path), ids, volume.spacing, volume.source, image=image)

    write = functools.partial(
        write_prediction, folder=output, names=names, window=predictor.preprocessing.window
    )
    size = sum(path.stat().st_size for path in files)  # compressed CT: about a byte per voxel
    count = worker_count(workers, len(files), size)
    try:
        for stem, facts in map_in_order(write, predicted(), count):
            _print_line(f"{stem}: {_volume_text(facts['ml'])}")
            masks.add(stem, facts, warned[stem])
    finally:
        masks.close()
    done = sum(stem_of(path) in warned for path in files)
    if not done and not there:
        return failed
    text = f"{done} mask{'s' * (done != 1)} in {output} ({time.perf_counter() - started:.1f} s)"
    text += f", {len(there)} of {total} already existed" if there else ""
    print(f"{text}; organ volumes in {output / VOLUMES}")
    return failed


def _print_line(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(sanitize(line, _LONGEST))  # file names are untrusted


def by_stem(inputs: Iterable[Path]) -> dict[str, Path]:
    """{name of the mask without its suffix: input}."""
    return {stem_of(path): path for path in inputs}


def _volume_text(volumes: Mapping[str, float]) -> str:
    """The organs found with their volumes in ml."""
    found = (
        f"{name} {ml:.0f} ml" if ml >= 100 else f"{name} {ml:.3g} ml"
        for name, ml in volumes.items()
        if ml
    )
    return ", ".join(found) or "no organ found"


def _read(path: Path, axis: str) -> Volume | UserError:
    from pgpsam_jax.data.io.volumes import read_image

    try:
        return read_image(path, axis)
    except UserError as error:
        return error


def main() -> None:
    parser = Parser("pgpsam_jax.predict", __doc__)
    parser.add_argument("--workdir", help="folder of a trained run")
    parser.add_argument("--input", required=True, help="NIfTI file, or folder of NIfTI files")
    parser.add_argument("--output", required=True, help="folder for the masks")
    parser.add_argument(
        "--overlay", action="store_true", help="write a PNG of slices beside each mask"
    )
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
        if arguments.workdir:
            config = load_config(arguments.workdir)  # cheap checks first
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
    if arguments.skip_existing and (arguments.boxes_from or arguments.truth):
        raise UserError("--skip-existing would leave volumes unscored; leave it out")


def _open(arguments: argparse.Namespace, inputs: Inputs) -> Any:
    """A `TrainedRun` or a `BoxRun`."""
    if arguments.workdir:
        from pgpsam_jax.inference.trained_run import load_run

        return load_run(arguments.workdir, arguments.base)
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
