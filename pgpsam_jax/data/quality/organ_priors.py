"""Priors of abdominal organ positions and sizes, and the misfit of a label id to each organ.

Five features describe each label id of a case: volume, side, depth, height and extent in z,
relative to the body and to the other organs. `ORGANS` holds their means, from general knowledge of
the adult abdomen, with generous spreads: the liver is the largest organ (1.4 l), on the right; the
spleen (0.2 l) is on the left, posterior; the kidneys (0.16 l each) are on either side of the spine,
the right one lower; aorta and vena cava run through all slices beside the midline; the gallbladder
(30 ml) is right and anterior, the stomach left and anterior, the pancreas (70 ml) between them near
the midline, portal and splenic vein behind it, esophagus and adrenal glands high up. The means were
not fitted to a data set: they are round numbers between those of one real CT (the abdomen of the
TotalSegmentator tests) and two phantoms.

The misfit of an id to an organ is the negative log-likelihood under independent normal
distributions, each term bounded so that one odd case (a removed kidney, a huge stomach) cannot
decide. Letters: N organs, F features.
"""

import itertools
import re
from collections.abc import Mapping

import numpy as np

# organ: (ml, log spread), then (mean, spread) of side (left positive) and depth (posterior
# positive) in half body widths from the body center, height above the mean organ and extent in z,
# both as fractions of the z extent of the labeled region.
ORGANS = {
    "spleen": ((200, 0.5), (0.55, 0.12), (0.17, 0.15), (0.13, 0.10), (0.50, 0.15)),
    "right_kidney": ((160, 0.35), (-0.40, 0.10), (0.16, 0.13), (-0.14, 0.10), (0.55, 0.15)),
    "left_kidney": ((160, 0.35), (0.40, 0.10), (0.16, 0.13), (-0.09, 0.10), (0.55, 0.15)),
    "gallbladder": ((30, 0.8), (-0.32, 0.12), (-0.40, 0.18), (-0.08, 0.12), (0.25, 0.12)),
    "esophagus": ((12, 0.6), (0.13, 0.10), (-0.15, 0.15), (0.30, 0.15), (0.28, 0.15)),
    "liver": ((1400, 0.35), (-0.41, 0.12), (-0.17, 0.13), (0.09, 0.10), (0.75, 0.15)),
    "stomach": ((230, 0.8), (0.30, 0.13), (-0.37, 0.18), (0.10, 0.12), (0.50, 0.15)),
    "aorta": ((75, 0.5), (0.08, 0.06), (-0.10, 0.13), (0.00, 0.10), (0.97, 0.10)),
    "vena_cava": ((70, 0.5), (-0.10, 0.07), (-0.15, 0.13), (-0.08, 0.10), (0.92, 0.12)),
    "portal_splenic_vein": ((20, 0.8), (0.05, 0.08), (-0.20, 0.13), (0.03, 0.12), (0.28, 0.15)),
    "pancreas": ((70, 0.7), (0.11, 0.10), (-0.25, 0.13), (0.00, 0.10), (0.42, 0.15)),
    "right_adrenal": ((3.5, 0.8), (-0.22, 0.08), (0.08, 0.12), (0.12, 0.12), (0.15, 0.10)),
    "left_adrenal": ((4, 0.8), (0.22, 0.08), (0.06, 0.12), (0.12, 0.12), (0.15, 0.12)),
}
NAMES = tuple(ORGANS)
PRIOR = np.array(
    [((np.log(ml), spread), *rest) for (ml, spread), *rest in ORGANS.values()]
)  # (N, F, 2)
_BOUND = 4.0  # spreads; deviations are capped here
CERTAIN = 5.0  # gain in log-likelihood; swapping two organs in one case gives at least 6
_TYPICAL_ML = 2300.0  # all organs together, assumed when the voxel size is unknown

_KEYS = {  # organ: alternative sets of words; a trailing _ requires a side
    "portal_splenic_vein": ({"portal"},),
    "vena_cava": ({"cava"}, {"postcava"}, {"ivc"}),
    "kidney_": ({"kidney"},),
    "adrenal_": ({"adrenal"},),
    **{o: ({o},) for o in ("spleen", "gallbladder", "liver", "stomach", "aorta", "pancreas")},
    "esophagus": ({"esophagus"},),
}
_PARTS = {"tumor", "tumour", "tumors", "lesion", "lesions", "cyst", "cysts", "cancer", "vessel"}


def organ_of(name: str) -> str | None:
    """Returns the organ of `ORGANS` that a class name means, or None."""
    words = set(re.findall(r"[a-z]+", name.lower().replace("oeso", "eso")))
    side = next((s for s in ("left", "right") if words & {s, s[0]}), None)
    for organ, keys in _KEYS.items():
        if any(key <= words for key in keys) and not words & _PARTS:
            return organ if not organ.endswith("_") else side and f"{side}_{organ[:-1]}"
    return None


def describe(
    image: np.ndarray, ids: np.ndarray, spacing, *, has_grid: bool = True
) -> dict[int, list[float]]:
    """Returns the features of each label id of a case, `{id: [F floats]}`.

    Args:
        image, ids: (D, H, W) in display orientation.
        spacing: voxel size in mm along (D, H, W).
        has_grid: False if the voxel size is unknown; volumes are then relative to all organs.
    """
    from scipy import ndimage  # slow to import, and most runs find their checks cached

    boxes = ndimage.find_objects(ids)
    found = {i: box for i, box in enumerate(boxes, 1) if box is not None}
    if not found:
        return {}
    first = min(box[0].start for box in found.values())
    last = max(box[0].stop for box in found.values())
    center, half = _body(image[first:last], first)
    result = {}
    for i, box in found.items():
        mask = ids[box] == i
        count = int(mask.sum())
        at = [
            box[axis].start + float(np.arange(n) @ mask.sum(axis=tuple({0, 1, 2} - {axis}))) / count
            for axis, n in enumerate(mask.shape)
        ]
        extent = (box[0].stop - box[0].start) / (last - first)
        side, depth = (at[2] - center[2]) / half[2], (at[1] - center[1]) / half[1]
        result[i] = [count, side, depth, at[0] / (last - first), extent]
    total = sum(features[0] for features in result.values())
    milliliters = np.prod(spacing) / 1000 if has_grid else _TYPICAL_ML / total
    mean_height = np.mean([features[3] for features in result.values()])
    for features in result.values():
        features[0] = float(np.log(features[0] * milliliters))
        features[3] -= float(mean_height)
    return {i: [round(float(f), 4) for f in features] for i, features in result.items()}


def _body(image: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Center and half width of the body (not air) in voxels per axis, from a coarse sample."""
    steps = [max(1, n // 64) for n in image.shape]
    sample = image[:: steps[0], :: steps[1], :: steps[2]]
    low, high = float(sample.min()), float(sample.max())
    air = -250.0 if low < -500 else low + 0.02 * (high - low)
    points = np.argwhere(sample > air) * steps
    if len(points) < 2:
        return np.array(image.shape) / 2 + np.array([first, 0, 0]), np.array(image.shape) / 2
    return points.mean(axis=0) + np.array([first, 0, 0]), 2 * points.std(axis=0) + 1e-6


# (transposed in plane, sign of side, of depth, of height), identity first.
ORIENTATIONS = [
    (transposed, side, depth, height)
    for transposed in (False, True)
    for height, depth, side in itertools.product((1, -1), repeat=3)
]


def misfits(
    features: Mapping[int, list[float]], *, all_orientations: bool = True
) -> dict[int, np.ndarray]:
    """Returns per id the misfit (orientations, N) to each organ, or only (1, N) as stored."""
    result = {}
    for i, (volume, side, depth, height, extent) in features.items():
        turned = [
            (volume, *((s * depth, d * side) if t else (s * side, d * depth)), h * height, extent)
            for t, s, d, h in ORIENTATIONS[: None if all_orientations else 1]
        ]
        away = np.abs(np.array(turned)[:, None] - PRIOR[None, ..., 0]) / PRIOR[None, ..., 1]
        terms = np.minimum(away, _BOUND) ** 2 / 2 + np.log(PRIOR[None, ..., 1])
        result[i] = terms.sum(axis=-1)
    return result


def flips_of(features: Mapping[int, list[float]], names: Mapping[int, str]) -> str | None:
    """Names the flips and transpositions that its affine misses; None if the case looks right."""
    fits = misfits(features)
    table = {i: organ_of(names[i]) for i in fits if i in names}
    table = {i: organ for i, organ in table.items() if organ}
    if len(table) < 4:
        return None
    each = (fits[i][:, NAMES.index(organ)] for i, organ in table.items())
    total = sum(each, np.zeros(len(ORIENTATIONS)))
    best = int(total.argmin())
    if total[0] - total[best] < 2 * CERTAIN:
        return None
    transposed, side, depth, height = ORIENTATIONS[best]
    words = ["rows and columns exchanged"] if transposed else []
    words += ["left and right flipped"] if side < 0 else []
    words += ["front and back flipped"] if depth < 0 else []
    words += ["head and feet flipped"] if height < 0 else []
    return " and ".join(words)
