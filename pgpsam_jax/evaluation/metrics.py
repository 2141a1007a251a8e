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


def surface(mask) -> np.ndarray:
    """Voxels of a boolean (D, H, W) mask with a 6-neighbour outside it (or outside the volume)."""
    interior = mask.copy()
    for axis in range(mask.ndim):
        inner, outer = np.moveaxis(interior, axis, 0), np.moveaxis(mask, axis, 0)
        inner[1:] &= outer[:-1]
        inner[:-1] &= outer[1:]
        inner[0] = inner[-1] = False
    return mask & ~interior


def surface_distances(prediction, truth, spacing, region=None) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each scored surface voxel to the other mask's surface, both ways.

    prediction, truth: boolean (D, H, W). spacing: mm along (D, H, W). region: boolean (D,) or None.
    Returns two float64 vectors (prediction to truth, truth to prediction). A mask without a voxel
    in the scored slices has an empty vector; where the other mask is empty the distances are inf.
    """
    box = bounding_box(prediction | truth)
    if box is None:
        return np.empty(0), np.empty(0)
    if region is not None:
        region = region[box[0]]
    edges = surface(prediction[box]), surface(truth[box])
    return (
        _distances(edges[0], edges[1], spacing, region),
        _distances(edges[1], edges[0], spacing, region),
    )


def bounding_box(mask) -> tuple[slice, ...] | None:
    """Smallest box of slices that holds every voxel of a mask, or None if it is empty."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        places = np.flatnonzero(mask.any(axis=others))
        if not places.size:
            return None
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return tuple(box)


def _distances(source, target, spacing, region) -> np.ndarray:
    """Distance of every scored voxel of the surface `source` to the surface `target`."""
    points = np.argwhere(source)
    if region is not None:
        points = points[region[points[:, 0]]]
    if not points.size:
        return np.empty(0)
    targets = np.argwhere(target)
    if not targets.size:
        return np.full(len(points), np.inf)
    if (len(points) + len(targets)) * _VOXELS_PER_TREE_POINT > source.size:
        return ndimage.distance_transform_edt(~target, sampling=spacing)[tuple(points.T)]
    return _tree_distances(points, targets, ~target[tuple(points.T)], np.asarray(spacing))


def _tree_distances(points, targets, apart, spacing) -> np.ndarray:
    """Nearest-point distances through a k-d tree; voxels not `apart` are shared, hence at 0."""
    distances = np.zeros(len(points))
    far = points[apart]
    if far.size:
        # Unbalanced trees build faster and answer as fast on points this regular.
        tree = cKDTree(targets * spacing, balanced_tree=False, compact_nodes=False)
        _, nearest = tree.query(far * spacing)
        # From whole voxel steps, so that moving a pair of masks cannot change a distance.
        steps = (far - targets[nearest]) * spacing
        distances[apart] = np.sqrt(np.square(steps).sum(axis=1))
    return distances
