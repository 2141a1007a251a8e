"""Warnings for classes that are never predicted in validation.

Small organs are often not predicted for a while at the start of a run. A class that stays so is
dead: its Dice is zero, which a mean over organs hides.
"""

from collections.abc import Sequence

import numpy as np

_PREFIX = "silent_epochs_"  # + class name: fields of metrics.jsonl


class DeadClassMonitor:
    """Counts the epochs for which each class present in the labels is not predicted.

    Args:
      names: K class names, the background first.
      truth: (N, H, W) class ids of the validation slices.
      dead_epochs: epochs after which a class is reported as dead; 0 = never.
    """

    def __init__(self, names: Sequence[str], truth: np.ndarray, dead_epochs: float):
        present = np.bincount(truth.ravel(), minlength=len(names))[1 : len(names)] > 0
        self._watched = {i: names[i] for i in (np.flatnonzero(present) + 1).tolist()}
        self._limit = dead_epochs
        self._silent = dict.fromkeys(self._watched, 0.0)
        self._epoch = 0.0

    def resume(self, record: dict, epoch: float) -> None:
        """Restores the counts from the metrics record of the last validation, at `epoch`."""
        self._epoch = epoch
        self._silent = {i: record.get(_PREFIX + n, 0.0) for i, n in self._watched.items()}

    def update(self, prediction: np.ndarray, epoch: float) -> list[str]:
        """Counts predicted class ids (N, H, W) at `epoch`; returns messages to print."""
        found = np.bincount(prediction.ravel(), minlength=max(self._watched, default=0) + 1) > 0
        passed, self._epoch, lines = epoch - self._epoch, epoch, []
        for i, name in self._watched.items():
            before = self._silent[i]
            now = self._silent[i] = 0.0 if found[i] else before + passed
            if not self._limit:
                continue
            if before < self._limit <= now:
                lines.append(
                    f"!!! DEAD CLASS: no pixel of the validation cases was predicted as {name} "
                    f"(class {i}) for {now:g} epochs; if this persists, lower optim.learning_rate, "
                    "or add slices that show it to the few-shot list"
                )
            elif now < self._limit <= before:
                lines.append(f"{name} (class {i}) is predicted again, after {before:g} epochs")
        return lines

    @property
    def record(self) -> dict[str, float]:
        """Epochs without a prediction, for each such class, as fields of metrics.jsonl."""
        return {_PREFIX + self._watched[i]: n for i, n in self._silent.items() if n > 0}
