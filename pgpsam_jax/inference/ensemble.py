"""Several trained runs as one: their probabilities are averaged."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pgpsam_jax.data.io.nifti import Volume
from pgpsam_jax.errors import UserError
from pgpsam_jax.inference.predictor import Predictor
from pgpsam_jax.inference.trained_run import TrainedRun, load_run


class Ensemble:
    """Averages the probabilities of predictors; stands for a `Predictor`.

    Each has its own settings; components are dropped as the first has it.

    Args:
      predictors: with the same classes and slice axis.
    """

    def __init__(self, predictors: Sequence[Predictor]):
        self.predictors = tuple(predictors)
        self.preprocessing = self.predictors[0].preprocessing

    def __call__(self, volume: Volume) -> np.ndarray:
        """Returns class ids (D, H, W) uint8 in the volume's display orientation."""
        return self.decide(self.probabilities(volume))

    def probabilities(self, volume: Volume) -> np.ndarray:
        """Returns the mean of the class probabilities, (D, H, W, K) float16."""
        first, *others = self.predictors
        total = first.probabilities(volume).astype(np.float32)
        for predictor in others:
            total += predictor.probabilities(volume)
        return (total / len(self.predictors)).astype(np.float16)

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns class ids (D, H, W) uint8 for probabilities (D, H, W, K), components dropped."""
        return self.predictors[0].decide(probabilities)


@dataclasses.dataclass(frozen=True, eq=False)
class EnsembleRun:
    """Several runs, with what is recorded of them."""

    runs: tuple[TrainedRun, ...]
    predictor: Ensemble

    @property
    def label_names(self) -> tuple[str, ...]:
        """K class names, the background first."""
        return self.runs[0].label_names

    @property
    def identity(self) -> dict:
        """Workdirs and parameters of the runs."""
        fields = [run.identity for run in self.runs]
        return {key: " + ".join(each[key] for each in fields) for key in fields[0]}

    def remarks(self, volume: Volume) -> list[str]:
        """Returns the warnings that any of the runs has about a volume, each once."""
        return list(dict.fromkeys(text for run in self.runs for text in run.remarks(volume)))


def load_runs(workdirs: Sequence[str], base: str | None = None) -> TrainedRun | EnsembleRun:
    """Loads a trained run, or several as one.

    Args:
      workdirs: of the runs, which must have the same classes and slice axis.
      base: as for `load_run`.

    Raises:
      UserError: a run cannot be loaded, or they do not belong together.
    """
    runs = [load_run(workdir, base) for workdir in workdirs]
    first = runs[0]
    for run in runs[1:]:
        for what, own, other in (
            ("classes", run.label_names, first.label_names),
            ("slice axis", run.config.data.axis, first.config.data.axis),
        ):
            if own != other:
                raise UserError(
                    f"{run.workdir} and {first.workdir} cannot be averaged: their {what} differ, "
                    f"{_text(own)} and {_text(other)}"
                )
    if len(runs) == 1:
        return first
    return EnsembleRun(tuple(runs), Ensemble([run.predictor for run in runs]))


def _text(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)
