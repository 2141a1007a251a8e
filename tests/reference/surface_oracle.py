"""The surface of a mask, by the definition."""

import numpy as np


def oracle_surface(mask):
    """By the definition: a voxel with one of its six neighbors outside the mask or volume."""
    points = []
    for voxel in np.ndindex(mask.shape):
        steps = [np.add(voxel, s * np.eye(3, dtype=int)[a]) for a in range(3) for s in (-1, 1)]
        inside = [
            np.all(step >= 0) and np.all(step < mask.shape) and mask[tuple(step)] for step in steps
        ]
        if mask[voxel] and not all(inside):
            points.append(voxel)
    return points
