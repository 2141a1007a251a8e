"""The parameters with the best validation score, and whether a run uses them."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing.checkpoint import BEST, Checkpoints, _Folder
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import StrPath


def keeps_best(validation: ConfigDict) -> bool:
    """Whether a run keeps the parameters with the best validation score, not the last."""
    return validation.every_epochs != 0


def notice(validation: ConfigDict, workdir: StrPath) -> str | None:
    """Returns a notice that names the parameters in use, or None if they are the newest."""
    if not keeps_best(validation):
        return None
    best = best_record(workdir)
    if best is None:
        return "Validation has selected no parameters yet; the newest checkpoint is used."
    return (
        f"Parameters from step {best['step']}, the best on the validation cases: slice Dice "
        f"{best['score']:.4f} (protocol release, at network size)."
    )


class BestCheckpoint(_Folder):
    """The `best` folder of a workdir: the parameters with the best validation score.

    Numbered by improvement, not by step: a run that resumes from an older checkpoint may improve
    at an earlier step than that of the parameters kept last.
    """

    def __init__(self, workdir: StrPath, *, reading: bool = False) -> None:
        super().__init__(Path(workdir) / BEST, 1, reading=reading)

    @property
    def record(self) -> dict[str, Any] | None:
        """The stored `step` and `score`, or None."""
        if self._newest is None:
            return None
        record = self._newest.metrics
        if not (isinstance(record, dict) and record.keys() >= {"step", "score"}):
            raise UserError(
                f"checkpoint {self.folder / str(self.latest)} is damaged (it has no record of its "
                "step and score); delete that folder to continue without it"
            )
        return record

    def save(self, params: Any, step: int, score: float) -> None:
        """Replaces parameters and record atomically."""
        number = 0 if self.latest is None else self.latest + 1
        self._save(number, {"params": params}, metrics={"step": step, "score": score})
        self.wait_for_save()


def best_record(workdir: StrPath) -> dict[str, Any] | None:
    """Returns the record of the `best` folder, or None if validation has selected nothing."""
    with BestCheckpoint(workdir, reading=True) as best:
        return best.record


def restore_params(workdir: StrPath, abstract_params: Any, *, best: bool) -> Any:
    """Restores the trainable parameters of a workdir.

    Args:
      workdir: of the run.
      abstract_params: shapes with shardings; empty for methods without trainable parameters.
      best: restores the best parameters if validation has selected any, else the newest.

    Raises:
      UserError: there is no complete checkpoint, or it is damaged.
    """
    if not jax.tree.leaves(abstract_params):
        return abstract_params
    kind = BestCheckpoint if best and best_record(workdir) else Checkpoints
    with kind(workdir, reading=True) as folder:
        return folder.restore_params(abstract_params)
