"""Maps uniform random numbers from [0, 1) to ranges and choices."""

import numpy as np


def between(uniform, low: float, high: float):
    """Maps [0, 1) to [low, high)."""
    return low + (high - low) * uniform


def one_of(uniform, probabilities):
    """Chooses at most one of n events by one number; returns (n,) booleans."""
    edge = np.concatenate([[0], np.cumsum(probabilities)]).astype(np.float32)
    return (uniform >= edge[:-1]) & (uniform < edge[1:])
