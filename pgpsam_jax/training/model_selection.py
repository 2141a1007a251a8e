"""Selects the parameters to keep by the Dice of the validation cases during training.

The release's rule (docs/release_code.md#loss-schedule-and-selection): validation segments all
valid slices of the validation cases and keeps the parameters with the highest slice-level Dice of
protocol `release`. Slices are scored at network size, where the release takes its argmax too.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from pgpsam_jax.checkpointing import best_parameters
from pgpsam_jax.data.dataset import Split, ValidationData
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.training.dead_classes import DeadClassMonitor
from pgpsam_jax.utils.files import read_metrics


def check(validation: ConfigDict, data: ConfigDict, split: Split) -> None:
    """Checks the settings of validation before anything is computed.

    Raises:
      UserError: a setting is negative, or there are no validation cases.
    """
    every = validation.every_epochs
    if every < 0:
        raise UserError(f"validation.every_epochs is {every}; give a number of epochs, or 0 (off)")
    if (dead := validation.dead_epochs) < 0:
        raise UserError(f"validation.dead_epochs is {dead}; give a number of epochs, or 0 (never)")
    if every and not split.validation:
        raise UserError(
            f"validation.every_epochs is {every}, but data.split {data.split!r} has no validation "
            "cases; use btcv_18_6_6, or fraction or group with data.validation_fraction, or list "
            '"validation" in data.split_file, or set validation.every_epochs to 0'
        )


class Selection:
    """Validates during training, keeps the best parameters and warns of dead classes.

    Args:
      validation: `config.validation`.
      data: the validation slices.
      workdir: the best parameters are kept in its folder `best`.
      batch_size: slices per step.
      epoch_size: slices of the few-shot list.
      total: steps of the run.
      names: of the K classes, for warnings.
    """

    def __init__(
        self,
        validation: ConfigDict,
        data: ValidationData,
        workdir,
        batch_size: int,
        epoch_size: int,
        total: int,
        names: Sequence[str] = (),
    ):
        self._data, self._total, self._workdir = data, total, Path(workdir)
        self._batch_size, self._epoch_size = batch_size, epoch_size
        self._slices = validation.every_epochs * epoch_size  # between two validations
        self._best = best_parameters.BestCheckpoint(workdir)
        names = names or [f"class_{i}" for i in range(data.num_classes)]
        self._dead_classes = DeadClassMonitor(names, data.labels, validation.dead_epochs)
        self._fresh = True

    def should_validate(self, step: int) -> bool:
        """Whether this step completes `validation.every_epochs` epochs, or the run."""
        done, before = (n * self._batch_size // self._slices for n in (step, step - 1))
        return done > before or step == self._total

    def evaluate(self, predictor: Predictor, step: int) -> float:
        """Scores the predictor's parameters and keeps them if they are the best so far."""
        from pgpsam_jax.metrics.release_protocol import mean_slice_dice

        prediction = predictor.slices(self._data.images)  # gathered to all processes
        if self._fresh:
            self._resume(step)
        alarms = self._dead_classes.update(prediction, self._epoch(step))
        score = mean_slice_dice(prediction, self._data.labels, self._data.num_classes)
        best = self._best.record
        if best is None or score > best["score"]:
            self._best.save(predictor.params, step, score)
            standing = "the best so far"
        else:
            standing = f"best {best['score']:.4f} at step {best['step']}"
        if multihost.is_first():
            for line in (f"step {step}: validation Dice {score:.4f}, {standing}", *alarms):
                tqdm.write(line)
        return score

    @property
    def never_predicted(self) -> dict[str, float]:
        """After `evaluate`: epochs for which classes were not predicted, for metrics.jsonl."""
        return self._dead_classes.record

    def _epoch(self, step: int) -> float:
        return step * self._batch_size / self._epoch_size

    def _resume(self, step: int) -> None:
        """Restores the counts of dead classes from the last validation before `step`."""
        self._fresh = False
        validated = [r for r in read_metrics(self._workdir / "metrics.jsonl") if r["step"] < step]
        for record in reversed(validated):
            if "validation_score" in record:
                self._dead_classes.resume(record, self._epoch(record["step"]))
                return

    def close(self) -> None:
        """Releases the folder."""
        self._best.close()
