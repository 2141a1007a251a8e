"""Attention with decomposed relative positions by loops, in float64: the oracle of its tests."""

import numpy as np


def relative(got, expected) -> float:
    """Relative L2 error in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def literal(q, k, v, rel_h, rel_w, padding, *, grid):
    """The definition in numpy float64, one query at a time, padding cells one by one."""
    q, k, v, rel_h, rel_w, padding = (
        np.asarray(x, np.float64) for x in (q, k, v, rel_h, rel_w, padding)
    )
    h, w = ((len(table) + 1) // 2 for table in (rel_h, rel_w))
    places, out = list(np.ndindex(*grid)), np.zeros_like(v)
    for b, n in np.ndindex(*q.shape[:2]):
        at = {place: (k[b, n, i], v[b, n, i]) for i, place in enumerate(places)}
        cells = [at.get(cell, padding[:, n]) for cell in np.ndindex(h, w)]
        keys, values = (np.array(x) for x in zip(*cells, strict=True))
        for i, (row, column) in enumerate(places):
            x = q[b, n, i]
            score = keys @ x / np.sqrt(len(x)) + [
                x @ rel_h[row - r + h - 1] + x @ rel_w[column - c + w - 1]
                for r, c in np.ndindex(h, w)
            ]
            weight = np.exp(score - score.max())
            out[b, n, i] = weight @ values / weight.sum()
    return out
