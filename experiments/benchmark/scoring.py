"""Times the scores of one volume: Dice, HD95, NSD and all protocols; needs no JAX.

The truth is eight organs of human size, the prediction the same organs with an irregular
boundary, patches far away, and the gallbladder missed.
"""

import time

import numpy as np
from scipy import ndimage

from experiments.measurement.timing import quartiles
from pgpsam_jax.metrics import surface
from pgpsam_jax.metrics.overlap import overlap_counts
from pgpsam_jax.metrics.protocols import score_case
from pgpsam_jax.metrics.release_protocol import score_release

FIELD_MM = (360.0, 384.0, 384.0)
# Center (share of the field) and half axes (mm) along (D, H, W); later organs overwrite earlier.
ORGANS = {
    "liver": ((0.60, 0.45, 0.30), (75, 72, 80)),
    "stomach": ((0.65, 0.38, 0.62), (45, 40, 55)),
    "spleen": ((0.68, 0.60, 0.78), (50, 32, 30)),
    "right_kidney": ((0.36, 0.62, 0.34), (55, 27, 27)),
    "left_kidney": ((0.38, 0.62, 0.66), (55, 27, 27)),
    "pancreas": ((0.45, 0.45, 0.52), (18, 14, 60)),
    "aorta": ((0.50, 0.58, 0.51), (160, 11, 11)),
    "gallbladder": ((0.45, 0.36, 0.36), (28, 14, 14)),
}
NAMES = ("background", *ORGANS)
MISSED = "gallbladder"
ISLANDS = 12


def scoring_benchmark(seed: int = 0, shape=(120, 512, 512), repeats: int = 3) -> dict:
    """Returns quartiles of the seconds to score one volume on one core, as a whole and in parts.

    Parts: `counts` (Dice of every protocol), `surfaces` of all organs, `distances_mm` (HD95, NSD)
    and `distances_voxels` (HD95 of `transunet`), `release`. The whole is what evaluation calls.
    """
    prediction, truth, spacing = synthetic_case(seed, shape)
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for part, run in _parts(prediction, truth, spacing):
            before = time.perf_counter()
            run()
            seconds.setdefault(part, []).append(time.perf_counter() - before)
    return {
        "shape": list(shape),
        "organs": len(ORGANS),
        "repeats": repeats,
        "seconds": {part: quartiles(values) for part, values in seconds.items()},
    }


def _parts(prediction, truth, spacing):
    """Returns (name, function) of the timed parts; later ones use results of earlier ones."""
    found = {}

    def whole():
        score_case(prediction, truth, spacing, NAMES, case_id="synthetic")
        score_release(prediction, truth, NAMES, case_id="synthetic", min_pixels=100)

    def surfaces():
        found["edges"] = [surface.surface_points(ids) for ids in (prediction, truth)]

    def distances(step):
        for class_id in range(1, len(NAMES)):
            ours, theirs = (points[ids == class_id] for points, ids in found["edges"])
            surface.point_distances(ours, theirs, (step,))

    yield "total", whole
    yield "counts", lambda: overlap_counts(prediction, truth, len(NAMES))
    yield "surfaces", surfaces
    yield "distances_mm", lambda: distances(spacing)
    yield "distances_voxels", lambda: distances((1.0, 1.0, 1.0))
    yield (
        "release",
        lambda: score_release(prediction, truth, NAMES, case_id="synthetic", min_pixels=100),
    )


def synthetic_case(seed: int = 0, shape=(120, 512, 512)):
    """Returns prediction, truth (class ids (D, H, W) uint8 of `NAMES`) and spacing in mm."""
    rng = np.random.default_rng(seed)
    spacing = tuple(mm / n for mm, n in zip(FIELD_MM, shape, strict=True))
    places = [(np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*places, indexing="ij", sparse=True)
    truth, prediction = np.zeros((2, *shape), np.uint8)
    for class_id, (share, half) in enumerate(ORGANS.values(), start=1):
        middle = np.multiply(share, FIELD_MM)
        box = tuple(
            slice(*np.searchsorted(place, (m - 1.4 * h, m + 1.4 * h)).tolist())
            for place, m, h in zip(places, middle, half, strict=True)
        )
        parts = zip((z[box[0]], y[:, box[1]], x[:, :, box[2]]), middle, half, strict=True)
        radius = np.sqrt(sum(((place - m) / h) ** 2 for place, m, h in parts))
        radius = _bent(rng, radius, 0.1, 4)
        truth[box][radius < 1] = class_id
        if NAMES[class_id] != MISSED:
            prediction[box][_bent(rng, radius, 2.0 / min(half), 16) < 1] = class_id
    for _ in range(ISLANDS):
        start = [int(rng.integers(0, max(1, n - 8))) for n in shape]
        island = tuple(slice(s, s + int(rng.integers(1, 8))) for s in start)
        prediction[island] = rng.integers(1, NAMES.index(MISSED))
    return prediction, truth, spacing


def _bent(rng, radius, size: float, waves: int) -> np.ndarray:
    """Adds smooth noise of standard deviation `size` to a field (D, H, W), `waves` per side."""
    coarse = rng.normal(0, size, (waves,) * 3)
    factors = [n / waves for n in radius.shape]
    return radius + ndimage.zoom(coarse, factors, order=1, grid_mode=True, mode="nearest")
