"""Overlap of two label maps: pixel counts per slice, and Dice from counts."""

import numpy as np


def overlap_counts(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the pixels of each organ per slice: in both, in the prediction, in the truth.

    Args:
        prediction, truth: (N, H, W) class ids.
        num_classes: K, background included.

    Returns:
        (3, N, K - 1).
    """
    counts = np.zeros((3, len(truth), num_classes - 1), np.int64)
    for index, (ours, theirs) in enumerate(zip(prediction, truth, strict=True)):
        organs = np.flatnonzero((ours != 0) | (theirs != 0))
        pairs = ours.ravel()[organs].astype(np.int64) * num_classes + theirs.ravel()[organs]
        table = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
        for kind, ids in enumerate((table.diagonal(), table.sum(axis=1), table.sum(axis=0))):
            counts[kind, index] = ids[1:]
    return counts


def dice_of_counts(counts: np.ndarray) -> np.ndarray:
    """Converts counts (3, ...) to Dice (...); NaN for an organ in neither map."""
    both, predicted, true = counts
    size = predicted + true
    return np.where(size > 0, 2.0 * both / np.maximum(size, 1), np.nan)


def slice_dice(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Dice (N, K - 1) per slice and organ of two (N, H, W) maps; NaN where absent from both."""
    return dice_of_counts(overlap_counts(prediction, truth, num_classes))
