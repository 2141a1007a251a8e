"""Lists of points: a point is one measurement, its `key` names its row."""

import itertools

CLASSES = 9  # eight organs and background, as Synapse
SLICES = 221  # of the paper's few-shot list


def cross(kind: type, **lists) -> list:
    """Returns every combination of the values of a point's fields, the last field fastest."""
    rows = itertools.product(*lists.values())
    return unique(kind(**dict(zip(lists, row, strict=True))) for row in rows)


def unique(points) -> list:
    """Drops points whose key is already there."""
    return list({point.key: point for point in points}.values())
