"""Uniform draws from [0, 1) as the choices and ranges of augmentation."""

import numpy as np


def between(uniform, low: float, high: float):
    """Draws from [0, 1) moved to [low, high)."""
    return low + (high - low) * uniform


def one_of(draw, probabilities):
    """(n,) booleans, at most one of them true: the adjoining interval that one draw falls into."""
    edge = np.concatenate([[0], np.cumsum(probabilities)]).astype(np.float32)
    return (draw >= edge[:-1]) & (draw < edge[1:])
