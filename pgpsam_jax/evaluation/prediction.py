"""Segments a folder of volumes and writes masks: what `pgpsam predict` does with a predictor."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# NumPy, NiBabel and JAX are imported where they are used, after --help.
from pgpsam_jax.data.io.volume_files import Inputs, stem_of
from pgpsam_jax.errors import UserError
from pgpsam_jax.evaluation.masks import VOLUMES, Masks
from pgpsam_jax.runtime.worker_pool import map_ahead, map_in_order, worker_count
from pgpsam_jax.utils.files import StrPath
from pgpsam_jax.utils.untrusted_text import sanitize

if TYPE_CHECKING:
    import numpy as np

    from pgpsam_jax.data.io.nifti import Volume
    from pgpsam_jax.inference.box_prompts import BoxPredictor
    from pgpsam_jax.inference.ensemble import Ensemble
    from pgpsam_jax.inference.predictor import Predictor

_LONGEST = 2000  # characters of a line
MAPS = {  # what may be written beside masks, each in a folder of this name
    "probabilities": "the probabilities of all classes, along a fourth axis",
    "uncertainty": "their entropy, from 0 (certain) to 1 (all classes alike)",
}


def predict(
    predictor: Predictor | Ensemble | BoxPredictor,
    names: Sequence[str],
    inputs: Inputs,
    output: StrPath,
    *,
    run: Mapping[str, str],
    overlay: bool = False,
    maps: Sequence[str] = (),
    skip_existing: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    warnings_of: Callable[[Volume], Iterable[str]] = lambda volume: (),
    axis: str = "axial",
) -> int:
    """Writes `<output>/<name>.nii.gz` for each input; unreadable files are reported and skipped.

    Args:
        predictor: of the run.
        names: K class names, background first.
        inputs: files to segment.
        output: folder of the masks.
        run: `TrainedRun.identity`, recorded with the masks.
        overlay: write a contact sheet beside each mask.
        maps: names in `MAPS`, of what to write besides.
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

    def segment(volume: Volume) -> tuple[np.ndarray, np.ndarray | None]:
        if not maps:
            return predictor(volume), None
        found = predictor.probabilities(volume)  # type: ignore[union-attr]  # not of boxes
        return predictor.decide(found), found  # type: ignore[union-attr]

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
                ids, found = segment(volume)
            except UserError as error:  # its boxes or its label
                _print_line(f"error: {error}")
                failed += 1
                warned.pop(stem_of(path))
                continue
            grid = volume.spacing, volume.source
            yield PredictedVolume(stem_of(path), ids, *grid, image=image, probabilities=found)

    window = predictor.preprocessing.window
    write = functools.partial(
        write_prediction, folder=output, names=names, window=window, maps=maps
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
