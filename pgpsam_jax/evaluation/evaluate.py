"""Score every test case on its own grid and write the tables, masks and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pgpsam_jax.data.cache import read_case
from pgpsam_jax.data.geometry import rescale
from pgpsam_jax.data.labels import LabelTable
from pgpsam_jax.data.layouts import Case
from pgpsam_jax.data.nifti import write_label
from pgpsam_jax.evaluation.inference import Predictor
from pgpsam_jax.evaluation.protocols import score_case
from pgpsam_jax.evaluation.release_protocol import score_release
from pgpsam_jax.evaluation.report import write_evaluation
from pgpsam_jax.visual import write_overlays


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
) -> dict:
    """Predict, score and write `folder`; returns the summary that `summary.json` holds.

    `min_pixels` is what some organ needs for its slice to be valid (protocol `release`).
    `region_of(case_id, truth)` may say which slices (D,) to score, where training and test share
    volumes. `notices` stand at the top of the report.
    """
    folder, rows, slices = Path(folder), [], []
    for case in tqdm(cases, desc="evaluating", unit="case"):
        volume, truth = read_case(case, table)
        prediction = predictor(volume)
        region = region_of(case.case_id, truth)
        rows += score_case(
            prediction,
            truth,
            volume.spacing,
            table.names,
            case_id=case.case_id,
            nsd_tolerance_mm=nsd_tolerance_mm,
            region=region,
        )
        of_volume, of_slices = score_release(
            prediction,
            truth,
            table.names,
            case_id=case.case_id,
            min_pixels=min_pixels,
            region=region,
        )
        rows += of_volume
        slices += of_slices
        write_label(folder / "predictions" / f"{case.case_id}.nii.gz", prediction, volume.source)
        if overlays:
            write_overlays(
                rescale(volume.array, predictor.window),
                truth,
                prediction,
                volume.spacing,
                table.names,
                case.case_id,
                folder / "overlays",
                region=region,
            )
    meta = {
        "nsd_tolerance_mm": nsd_tolerance_mm,
        "valid_min_pixels": min_pixels,
        "notices": list(notices),
    }
    return write_evaluation(rows, folder, table.names, meta, slices)
