"""Scores, mask file and images of a predicted volume. Free of JAX, for worker processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgpsam_jax.data.io.nifti import SourceGrid, write_label, write_map
from pgpsam_jax.data.preprocessing import normalize_volume
from pgpsam_jax.inference.postprocessing import uncertainty
from pgpsam_jax.metrics.protocols import score_case
from pgpsam_jax.metrics.release_protocol import score_release
from pgpsam_jax.utils.files import file_digest


@dataclass(frozen=True, eq=False)
class PredictedVolume:
    """A volume (D, H, W) in display orientation and its predicted class ids.

    image: intensities, None for no images; probabilities: (D, H, W, K), None for no maps.
    """

    name: str
    prediction: np.ndarray
    spacing: tuple[float, float, float]
    source: SourceGrid
    image: np.ndarray | None = None
    probabilities: np.ndarray | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class LabeledVolume(PredictedVolume):
    """With true class ids; region: boolean (D,), the slices to score, None for all."""

    truth: np.ndarray
    region: np.ndarray | None = None


def score_and_write(
    case: LabeledVolume, *, folder: Path, names, window, nsd_tolerance_mm: float, min_pixels: int
) -> tuple[list[dict], list[dict]]:
    """Writes mask and overlays of a case; returns its rows of `cases.csv` and `slices.csv`."""
    options: dict[str, Any] = {"case_id": case.name, "region": case.region}
    pair = case.prediction, case.truth
    rows = score_case(*pair, case.spacing, names, nsd_tolerance_mm=nsd_tolerance_mm, **options)
    of_volume, slices = score_release(*pair, names, min_pixels=min_pixels, **options)
    write_label(folder / "predictions" / f"{case.name}.nii.gz", case.prediction, case.source)
    if case.image is not None:
        from pgpsam_jax.visualization.overlays import write_overlays

        maps, place = (case.truth, case.prediction), folder / "overlays"
        image = normalize_volume(case.image, window)
        write_overlays(
            image,
            *maps,
            case.spacing,
            names,
            case.name,
            place,
            case.region,
            directions=case.source.directions,
        )
    return rows + of_volume, slices


def write_prediction(
    case: PredictedVolume, *, folder: Path, names, window, maps: Sequence[str] = ()
) -> tuple[str, dict]:
    """Writes `<folder>/<name>.nii.gz` and, if the image is given, a contact sheet beside it.

    maps: "probabilities", "uncertainty", or both, written to folders of these names.
    Returns the name and the facts for `Masks`: voxels and milliliters per organ, SHA-256.
    """
    path = folder / f"{case.name}.nii.gz"
    write_label(path, case.prediction, case.source)
    if case.probabilities is not None:
        found = {
            "probabilities": lambda: case.probabilities,
            "uncertainty": lambda: uncertainty(case.probabilities),
        }
        for name in maps:
            write_map(folder / name / path.name, found[name](), case.source)
    if case.image is not None:
        from pgpsam_jax.visualization.overlays import write_preview

        picture = folder / f"{case.name}.png"
        write_preview(
            normalize_volume(case.image, window),
            case.prediction,
            case.spacing,
            names,
            picture,
            directions=case.source.directions,
        )
    counts = np.bincount(case.prediction.ravel(), minlength=len(names))
    voxels = {name: int(count) for name, count in zip(names[1:], counts[1:], strict=True)}
    one = math.prod(case.spacing) / 1000
    ml = {name: float(f"{count * one:.6g}") for name, count in voxels.items()}
    return case.name, {"voxels": voxels, "ml": ml, "sha256": file_digest(path)}
