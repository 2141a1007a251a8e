"""Scores test cases on their native voxel grids and writes tables, masks and overlays."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pgpsam_jax.data.cache import read_case
from pgpsam_jax.data.io.pairing import LOST, pair_grids
from pgpsam_jax.data.io.volumes import read_grid
from pgpsam_jax.data.io.voxel_grid import AXIAL
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable
from pgpsam_jax.distributed import multihost
from pgpsam_jax.evaluation.outputs import LabeledVolume, score_and_write
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.metrics.summary import write_evaluation
from pgpsam_jax.runtime.worker_pool import map_ahead, map_in_order, worker_count


def evaluate(
    predictor: Predictor,
    cases: Sequence[Case],
    table: LabelTable,
    folder,
    *,
    nsd_tolerance_mm: float,
    min_pixels: int,
    overlays: bool,
    region_of: Callable[[str, np.ndarray], np.ndarray | None] = lambda case_id, truth: None,
    notices: Sequence[str] = (),
    workers: int = 0,
    axis: str = AXIAL,
) -> dict:
    """Predicts and scores cases, writes `folder` and returns the contents of `summary.json`.

    Of several processes, each takes its share of the cases with a predictor on its local devices;
    the first writes the tables.

    Args:
      predictor: on the local devices.
      cases: with labels.
      table: class names and ids.
      folder: for tables, masks and overlays.
      nsd_tolerance_mm: tolerance of the NSD in mm.
      min_pixels: of some organ, for a slice to be valid (protocol `release`).
      overlays: whether to draw overlays.
      region_of: (case id, truth) -> slices (D,) to score, or None for all; used where training and
        test share volumes.
      notices: shown above the tables.
      workers: processes that score and draw (`eval.workers`); they change no number.
      axis: of the slices, one of `voxel_grid.AXES`.
    """
    folder, rows, slices = Path(folder), [], []
    notices = [*notices, *_doubtful_pairs(cases)]
    groups = {case.case_id: case.group for case in cases if case.group}
    count, cases = len(cases), multihost.shard_for_process(cases)
    voxels = sum(math.prod(read_grid(case.image).shape) for case in cases)
    finish = functools.partial(
        score_and_write,
        folder=folder,
        names=table.names,
        window=predictor.preprocessing.window,
        nsd_tolerance_mm=nsd_tolerance_mm,
        min_pixels=min_pixels,
    )

    def predicted():
        reading = map_ahead(lambda case: read_case(case, table, axis), cases)
        silent = not multihost.is_first()
        progress = tqdm(cases, desc="evaluating", unit="case", disable=silent)
        for case, (volume, truth) in zip(progress, reading, strict=True):
            yield LabeledVolume(
                case.case_id,
                predictor(volume, truth) if predictor.oracle else predictor(volume),
                volume.spacing,
                volume.source,
                image=volume.array if overlays else None,
                truth=truth,
                region=region_of(case.case_id, truth),
            )

    scored = map_in_order(finish, predicted(), worker_count(workers, len(cases), voxels))
    shares = multihost.gather(list(scored))
    for index in range(count):
        of_case, of_slices = shares[index % len(shares)][index // len(shares)]
        rows += of_case
        slices += of_slices
    meta = {
        "nsd_tolerance_mm": nsd_tolerance_mm,
        "valid_min_pixels": min_pixels,
        "notices": list(notices),
    }
    first = multihost.is_first()
    summary = {}
    if first:
        summary = write_evaluation(rows, folder, table.names, meta, slices, groups)
    return multihost.gather(summary)[0]


def _doubtful_pairs(cases: Sequence[Case]) -> list[str]:
    """A notice if scores depend on labels paired with images by storage order."""
    found = []
    for case in cases:
        if case.label is None:  # refused when it is read
            continue
        pairing = pair_grids(read_grid(case.image), read_grid(case.label))
        if pairing.code == LOST:
            found.append(f"{case.label.name} {pairing.remark}")
    more = f" (and {len(found) - 1} more labels likewise)" if len(found) > 1 else ""
    return [f"{found[0]}{more}."] if found else []
