"""Segment NIfTI files with a trained run. Masks have the voxel grid of their input.

Organ volumes are printed and written to volumes.csv and predictions.json (which also records the
run behind each mask); labels.json lists the class ids. Masks that this run did not write are
replaced only with --overwrite.

Examples:
  python -m pgpsam_jax.predict --workdir runs/x --input volume.nii.gz --output masks
  python -m pgpsam_jax.predict --workdir runs/x --input volumes --output masks --overlay
  python -m pgpsam_jax.predict --workdir runs/x --input volumes --output masks --skip-existing
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# NumPy, NiBabel and JAX are imported where they are used, after --help.
from pgpsam_jax.data.io.volume_files import Inputs, find_inputs, stem_of
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.masks import VOLUMES, Masks
from pgpsam_jax.runtime.cli import Parser, positive, running
from pgpsam_jax.runtime.malloc import keep_freed_memory
from pgpsam_jax.runtime.worker_pool import check, map_ahead, map_in_order, worker_count
from pgpsam_jax.utils.files import StrPath
from pgpsam_jax.utils.untrusted_text import sanitize

if TYPE_CHECKING:
    from pgpsam_jax.data.io.nifti import Volume
    from pgpsam_jax.inference.predictor import Predictor

_LONGEST = 2000  # characters of a line


def predict(
    predictor: Predictor,
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
        predictor: `Predictor` of the run.
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
            ids = predictor(volume)
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
    parser.add_argument("--workdir", required=True, help="folder of a trained run")
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
    parser.add_argument("--base", help="converted SAM weights of the run, if they have moved")
    with running():
        arguments = parser.parse_args()
        from pgpsam_jax.config import load_config
        from pgpsam_jax.data.io import array_checks
        from pgpsam_jax.inference.trained_run import load_run
        from pgpsam_jax.methods.registry import refuse_without_labels

        config = load_config(arguments.workdir)  # cheap checks first
        check(config.eval.workers)
        refuse_without_labels(config.model)
        inputs = find_inputs(arguments.input)
        options = {"overwrite": arguments.overwrite}
        Masks(arguments.output, by_stem(inputs.files), previews=arguments.overlay, **options)
        run = load_run(arguments.workdir, arguments.base)
        if arguments.max_gib:
            array_checks.allow(arguments.max_gib)
        failed = predict(
            run.predictor,
            run.label_names,
            inputs,
            arguments.output,
            run=run.identity,
            warnings_of=run.remarks,
            axis=run.config.data.axis,
            overlay=arguments.overlay,
            skip_existing=arguments.skip_existing,
            workers=run.config.eval.workers,
            **options,
        )
        if failed:
            total = len(inputs.files) + len(inputs.faults)
            others = f"; the others are in {arguments.output}" if failed < total else ""
            raise UserError(f"{failed} of {total} files could not be read (see above){others}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
