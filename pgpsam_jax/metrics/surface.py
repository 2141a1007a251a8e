"""Dice, 95th-percentile Hausdorff distance and normalized surface Dice of a pair of 3-D masks.

Definitions:

- The *surface* of a mask is the set of voxels removed by a 6-connected erosion; the outside of the
  volume counts as background, so a mask that touches the border has a surface there.
- Surface distances are Euclidean, between voxel centers, in the unit of the spacing.
- HD95 is the larger of the two directed 95th percentiles (as in MONAI and MetricsReloaded); the
  pooled HD95 is the percentile of both directions together (as in medpy and the TransUNet family).
- NSD is the share of surface voxels of both masks within a tolerance of the other surface
  (voxel counting: MONAI's `use_subvoxels=False`; not the area-weighted surface-distance variant).

A *region* is an optional boolean `(D,)` mask of the slices to score. Only voxels and surface voxels
in these slices count, but distances are to the other mask's surface in the entire volume, so that
excluding a slice never creates a surface. Undefined values are NaN; `protocols` defines the scores
of empty masks.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

# Counts a surface exactly at the tolerance despite a float32 spacing.
_TOLERANCE_SLACK = 1e-6
# A k-d tree costs time per surface voxel, the distance transform per voxel of the bounding box.
# Measured break-even: about ten voxels per surface voxel (speckled masks below, organs far above).
_VOXELS_PER_TREE_POINT = 10


def dice(prediction: np.ndarray, truth: np.ndarray, region: np.ndarray | None = None) -> float:
    """Returns 2 |P and T| / (|P| + |T|) over the scored slices; NaN if both are empty.

    prediction, truth: boolean (D, H, W). region: None or boolean (D,).
    """
    if region is not None:
        prediction, truth = prediction[region], truth[region]
    size = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2.0 * np.count_nonzero(prediction & truth) / size if size else float("nan")


def directed_percentile(forward: np.ndarray, backward: np.ndarray, percent: float = 95.0) -> float:
    """Returns the larger percentile of the two directions; NaN if a direction is empty."""
    if not (forward.size and backward.size):
        return float("nan")
    return float(max(np.percentile(forward, percent), np.percentile(backward, percent)))


def pooled_percentile(forward: np.ndarray, backward: np.ndarray, percent: float = 95.0) -> float:
    """Returns the percentile of both directions together; NaN if a direction is empty."""
    if not (forward.size and backward.size):
        return float("nan")
    return float(np.percentile(np.concatenate([forward, backward]), percent))


def share_within(forward: np.ndarray, backward: np.ndarray, tolerance: float) -> float:
    """Returns the share of distances <= tolerance; 0 if a direction is empty, NaN if both are."""
    if not (forward.size and backward.size):
        return 0.0 if forward.size or backward.size else float("nan")
    limit = tolerance * (1.0 + _TOLERANCE_SLACK)
    within = np.count_nonzero(forward <= limit) + np.count_nonzero(backward <= limit)
    return within / (forward.size + backward.size)


def surface(labels: np.ndarray) -> np.ndarray:
    """Returns the mask (D, H, W) of surface voxels of all classes, in one pass.

    labels: a boolean mask, or class ids with 0 for the background (no surface). Surface voxels have
    a 6-neighbor of another class or are at the border of the volume.
    """
    edge = np.empty(labels.shape, bool)
    last = len(labels) - 1
    for z, part in enumerate(labels):  # a slice and its neighbors fit in the CPU cache
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


def surface_points(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the surface voxels (N, 3) of a mask or label map in voxel order, and their ids."""
    indices = np.flatnonzero(surface(labels))
    points = np.stack(np.unravel_index(indices, labels.shape), axis=1)
    return points, labels.ravel()[indices]


def point_distances(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacings: Sequence[Sequence[float]],
    region: np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Computes the distance of each scored surface voxel to the other surface, both ways.

    Args:
        prediction, truth: surface voxels (N, 3), (M, 3) of two masks, in voxel order.
        spacings: mm along (D, H, W), several at once.
        region: boolean (D,) or None.

    Returns:
        For each spacing two float64 vectors (prediction to truth, truth to prediction): empty for a
        mask without voxels in the scored slices, inf if the other mask is empty.
    """
    both = np.concatenate([prediction, truth])
    if not len(both):
        return [(np.empty(0), np.empty(0))] * len(spacings)
    # Relative to their bounding box, so that translating both masks changes no distance.
    corner = both.min(axis=0)
    box = tuple((both.max(axis=0) - corner + 1).tolist())
    sides = [points - corner for points in (prediction, truth)]
    indices = [np.ravel_multi_index(tuple(side.T), box) for side in sides]
    scored = [
        np.ones(len(points), bool) if region is None else region[points[:, 0]]
        for points in (prediction, truth)
    ]
    directions = []
    for ours, theirs in ((0, 1), (1, 0)):
        kept = scored[ours]
        apart = kept & ~_is_in(indices[ours], indices[theirs])
        found = np.zeros((len(spacings), len(kept)))  # 0 for voxels of both surfaces
        far, count = sides[ours][apart], int(np.count_nonzero(kept))
        found[:, apart] = _distances(far, sides[theirs], spacings, box, count)
        directions.append(found[:, kept])
    return list(zip(*directions, strict=True))


def _is_in(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`np.isin` of two sorted arrays."""
    if not others.size:
        return np.zeros(len(values), bool)
    nearest = np.searchsorted(others, values).clip(max=len(others) - 1)
    return others[nearest] == values


def _distances(
    far: np.ndarray,
    targets: np.ndarray,
    spacings: Sequence[Sequence[float]],
    box: tuple[int, ...],
    count: int,
) -> list[np.ndarray]:
    """Distances of the points `far` to the nearest of `targets` for each spacing.

    box: shape of the bounding box. count: number of scored surface voxels, shared ones included.
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
            # Indices only: the distances would take a dozen more bytes per voxel.
            field = ndimage.distance_transform_edt(
                free, sampling=spacing, return_distances=False, return_indices=True
            )
            nearest = field[(slice(None), *far.T)].T
        else:
            # On such regular points, unbalanced trees build faster and query as fast.
            tree = cKDTree(targets * spacing, balanced_tree=False, compact_nodes=False)
            nearest = targets[tree.query(far * spacing)[1]]
        # From integer voxel offsets, so that rounding does not depend on the position.
        found.append(np.sqrt(np.square((far - nearest) * spacing).sum(axis=1)))
    return found
