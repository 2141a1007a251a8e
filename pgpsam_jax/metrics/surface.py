"""Dice, 95th-percentile Hausdorff distance and normalised surface Dice of one pair of 3-D masks.

Definitions, used throughout:

- The *surface* of a mask is the set of its voxels that a 6-connected erosion removes; outside the
  volume counts as background, so a mask that touches the border has a surface there.
- Surface distances are Euclidean, from voxel centre to voxel centre, in the unit of the spacing.
- HD95 is the larger of the two directed 95th percentiles (as in MONAI and MetricsReloaded); the
  pooled HD95 is the percentile of both directions together (as in medpy and the TransUNet family).
- NSD is the share of surface voxels of both masks that lie within a tolerance of the other surface
  (voxel counting: MONAI's `use_subvoxels=False`; not the area-weighted surface-distance variant).

A *region* is an optional boolean `(D,)` mask of the slices to score. Only voxels and surface voxels
in those slices are counted, but distances run to the other mask's surface in the whole volume, so
that hiding a slice never invents a surface. What is undefined is NaN: see `protocols` for the rules
on empty masks.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

# A surface exactly at the tolerance counts, although spacing is stored in float32.
_TOLERANCE_SLACK = 1e-6
# A tree costs time per surface voxel and the distance transform per voxel of the box. Measured
# break-even: about ten voxels per surface voxel (speckled masks are below it, organs far above).
_VOXELS_PER_TREE_POINT = 10


def dice(prediction, truth, region=None) -> float:
    """2 |P and T| / (|P| + |T|) over the scored slices; NaN where both are empty.

    prediction, truth: boolean (D, H, W). region: None or boolean (D,).
    """
    if region is not None:
        prediction, truth = prediction[region], truth[region]
    size = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2.0 * np.count_nonzero(prediction & truth) / size if size else float("nan")


def hd95(prediction, truth, spacing, region=None) -> float:
    """Larger of the two directed 95th percentiles, in mm; NaN where either mask is empty."""
    return directed_percentile(*surface_distances(prediction, truth, spacing, region))


def hd95_pooled(prediction, truth, spacing=(1.0, 1.0, 1.0), region=None) -> float:
    """95th percentile of both directions together, by default in voxels; NaN if one is empty."""
    return pooled_percentile(*surface_distances(prediction, truth, spacing, region))


def nsd(prediction, truth, spacing, tolerance_mm, region=None) -> float:
    """Share of both surfaces within `tolerance_mm` of the other; one empty 0, both empty NaN."""
    return share_within(*surface_distances(prediction, truth, spacing, region), tolerance_mm)


def directed_percentile(forward, backward, percent: float = 95.0) -> float:
    """max(percentile(forward), percentile(backward)); NaN where a direction has no distance."""
    if not (forward.size and backward.size):
        return float("nan")
    return float(max(np.percentile(forward, percent), np.percentile(backward, percent)))


def pooled_percentile(forward, backward, percent: float = 95.0) -> float:
    """Percentile of the two directions joined; NaN where a direction has no distance."""
    if not (forward.size and backward.size):
        return float("nan")
    return float(np.percentile(np.concatenate([forward, backward]), percent))


def share_within(forward, backward, tolerance: float) -> float:
    """Share of all distances <= tolerance; 0 where one direction is empty, NaN where both are."""
    if not (forward.size and backward.size):
        return 0.0 if forward.size or backward.size else float("nan")
    limit = tolerance * (1.0 + _TOLERANCE_SLACK)
    within = np.count_nonzero(forward <= limit) + np.count_nonzero(backward <= limit)
    return within / (forward.size + backward.size)


def surface(labels) -> np.ndarray:
    """Voxels (D, H, W) with a 6-neighbour of another class, or at the end of the volume.

    labels: a boolean mask, or class ids with 0 for the background, which has no surface here: the
    surfaces of all classes of a map in one pass.
    """
    edge = np.empty(labels.shape, bool)
    last = len(labels) - 1
    for z, part in enumerate(labels):  # a slice and its neighbours stay in the processor's cache
        if not part.any():
            edge[z] = False
            continue
        if z in (0, last):
            edge[z] = True
        else:
            edge[z] = (part != labels[z - 1]) | (part != labels[z + 1])
        for here, ids in ((edge[z], part), (edge[z].T, part.T)):
            apart = ids[1:] != ids[:-1]
            here[1:] |= apart
            here[:-1] |= apart
            here[:1] = here[-1:] = True
        edge[z] &= part != 0
    return edge


def surface_points(labels) -> tuple[np.ndarray, np.ndarray]:
    """Surface voxels (N, 3) of a mask or label map in the order of its voxels, and their ids."""
    places = np.flatnonzero(surface(labels))
    points = np.stack(np.unravel_index(places, labels.shape), axis=1)
    return points, labels.ravel()[places]


def surface_distances(prediction, truth, spacing, region=None) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each scored surface voxel to the other mask's surface, both ways.

    prediction, truth: boolean (D, H, W). spacing: mm along (D, H, W). region: boolean (D,) or None.
    Returns two float64 vectors (prediction to truth, truth to prediction). A mask without a voxel
    in the scored slices has an empty vector; where the other mask is empty the distances are inf.
    """
    points = surface_points(prediction)[0], surface_points(truth)[0]
    return point_distances(*points, (spacing,), region)[0]


def point_distances(
    prediction, truth, spacings: Sequence, region=None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`surface_distances` of two surfaces (N, 3), (M, 3) for each of several spacings."""
    both = np.concatenate([prediction, truth])
    if not len(both):
        return [(np.empty(0), np.empty(0))] * len(spacings)
    # From the corner of their box, so that moving a pair of masks cannot change a distance.
    corner = both.min(axis=0)
    box = tuple((both.max(axis=0) - corner + 1).tolist())
    sides = [points - corner for points in (prediction, truth)]
    places = [np.ravel_multi_index(tuple(side.T), box) for side in sides]
    scored = [
        np.ones(len(points), bool) if region is None else region[points[:, 0]]
        for points in (prediction, truth)
    ]
    directions = []
    for ours, theirs in ((0, 1), (1, 0)):
        wanted, apart = scored[ours], ~_among(places[ours], places[theirs])
        far = sides[ours][wanted & apart]
        found = _distances(far, sides[theirs], spacings, box, np.count_nonzero(wanted))
        directions.append([_spread(apart[wanted], values) for values in found])
    return list(zip(*directions, strict=True))


def _among(places, others) -> np.ndarray:
    """Which of some rising numbers are among other rising numbers."""
    if not others.size:
        return np.zeros(len(places), bool)
    nearest = np.searchsorted(others, places).clip(max=len(others) - 1)
    return others[nearest] == places


def _spread(apart, values) -> np.ndarray:
    """Values where `apart`, 0 for the voxels that both surfaces share."""
    distances = np.zeros(len(apart))
    distances[apart] = values
    return distances


def _distances(far, targets, spacings, box, count: int) -> list[np.ndarray]:
    """Distances of the points `far` to the nearest of `targets` for each spacing.

    box: shape that holds both. count: of the surface voxels of which `far` are not shared.
    """
    if not len(targets):
        return [np.full(len(far), np.inf)] * len(spacings)
    if not len(far):
        return [np.empty(0)] * len(spacings)
    by_transform = (count + len(targets)) * _VOXELS_PER_TREE_POINT > math.prod(box)
    if by_transform:
        free = np.ones(box, bool)
        free[tuple(targets.T)] = False
    found = []
    for spacing in np.asarray(spacings, float):
        if by_transform:
            # Indices alone: the transform's own distances take a dozen bytes more per voxel.
            field = ndimage.distance_transform_edt(
                free, sampling=spacing, return_distances=False, return_indices=True
            )
            nearest = field[(slice(None), *far.T)].T
        else:
            # Unbalanced trees build faster and answer as fast on points this regular.
            tree = cKDTree(targets * spacing, balanced_tree=False, compact_nodes=False)
            nearest = targets[tree.query(far * spacing)[1]]
        # From whole voxel steps, so that no rounding depends on where the masks lie.
        found.append(np.sqrt(np.square((far - nearest) * spacing).sum(axis=1)))
    return found
