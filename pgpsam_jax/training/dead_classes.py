"""Classes that a model stopped predicting, or never began to: seen in validation, and said once.

A class is *silent* while no pixel of any validation slice gets it though their labels have it.
Small organs are silent for a while at the start of a run; one that stays so is dead: its Dice is
zero, and a mean over organs hides it.
"""

from collections.abc import Sequence

import numpy as np

_PREFIX = "silent_epochs_"  # and the name of the class: fields of metrics.jsonl


class DeadClassMonitor:
    """How long each class has been silent, from one validation to the next.

    names: K class names, background (which is not watched) first. truth: labels (N, H, W) of the
    validation slices. dead_epochs: after so many the alarm is raised; 0 = never.
    """

    def __init__(self, names: Sequence[str], truth: np.ndarray, dead_epochs: float):
        present = np.bincount(truth.ravel(), minlength=len(names))[1 : len(names)] > 0
        self._watched = {i: names[i] for i in np.flatnonzero(present) + 1}
        self._limit = dead_epochs
        self._silent = dict.fromkeys(self._watched, 0.0)
        self._epoch = 0.0

    def resume(self, record: dict, epoch: float) -> None:
        """Stand where an earlier start of the run stood after its validation at `epoch`."""
        self._epoch = epoch
        self._silent = {i: record.get(_PREFIX + n, 0.0) for i, n in self._watched.items()}

    def update(self, prediction: np.ndarray, epoch: float) -> list[str]:
        """Take in class ids (N, H, W) found at `epoch`; lines to be said, one per class."""
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
                    f"(class {i}) for {now:g} epochs; if it stays so, lower optim.learning_rate, "
                    "or give the few-shot list more slices that show it"
                )
            elif now < self._limit <= before:
                lines.append(f"{name} (class {i}) is predicted again, after {before:g} epochs")
        return lines

    @property
    def record(self) -> dict[str, float]:
        """Epochs of silence of each class that is silent, as fields of the metrics file."""
        return {_PREFIX + self._watched[i]: n for i, n in self._silent.items() if n > 0}
