"""Surface scores of a pair of boolean masks (D, H, W), from the parts that score a volume."""

from pgpsam_jax.metrics import surface


def surface_distances(prediction, truth, spacing, region=None):
    points = surface.surface_points(prediction)[0], surface.surface_points(truth)[0]
    return surface.point_distances(*points, (spacing,), region)[0]


def hd95(*masks_spacing_region):
    return surface.directed_percentile(*surface_distances(*masks_spacing_region))


def hd95_pooled(prediction, truth, spacing=(1.0, 1.0, 1.0), region=None):
    return surface.pooled_percentile(*surface_distances(prediction, truth, spacing, region))


def nsd(prediction, truth, spacing, tolerance_mm, region=None):
    distances = surface_distances(prediction, truth, spacing, region)
    return surface.share_within(*distances, tolerance_mm)
