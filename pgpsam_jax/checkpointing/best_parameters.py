"""The parameters with the best validation score, and whether a run uses them."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing.checkpoint import BEST, Checkpoints, _Folder
from pgpsam_jax.errors import UserError


def is_on(validation: ConfigDict) -> bool:
    """Whether a run keeps the best parameters instead of the last."""
    return validation.every_epochs != 0


def notice(validation: ConfigDict, workdir) -> str | None:
    """Which parameters of a workdir are used, where that is not simply the newest."""
    if not is_on(validation):
        return None
    best = best_record(workdir)
    if best is None:
        return "Validation has chosen no parameters here: the newest checkpoint is used."
    return (
        f"The parameters are those of step {best['step']}, which did best on the validation cases: "
        f"slice Dice {best['score']:.4f} (protocol release, at network size)."
    )


class Best(_Folder):
    """The `best` folder of a workdir: the parameters that did best on the validation cases.

    Numbered by improvement, not by step: a run that goes on from an older checkpoint may find a
    better state at an earlier step than that of the last one kept.
    """

    def __init__(self, workdir, *, reading: bool = False):
        super().__init__(Path(workdir) / BEST, 1, reading=reading)

    @property
    def record(self) -> dict | None:
        """What was saved with them: their `step` and `score`."""
        if self._newest is None:
            return None
        record = self._newest.metrics
        if not (isinstance(record, dict) and record.keys() >= {"step", "score"}):
            raise UserError(
                f"checkpoint {self.folder / str(self.latest)} is damaged (it has no record of its "
                "step and score); delete that folder to go on without it"
            )
        return record

    def save(self, params, step: int, score: float) -> None:
        """Replace the parameters; they and the record appear together or not at all."""
        number = 0 if self.latest is None else self.latest + 1
        record = {"step": step, "score": score}
        self._save(number, {"params": params}, metrics=record)
        self._settle()


def best_record(workdir) -> dict | None:
    """The record of the `best` folder; None where validation has chosen nothing."""
    best = Best(workdir, reading=True)
    record = best.record
    best.close()
    return record


def restore_params(workdir, abstract_params, *, best: bool):
    """The trained parameters of a workdir: the newest, or with `best` those validation chose.

    Where it has chosen none yet, they are the newest too. Of a model that does not train, none.
    """
    if not jax.tree.leaves(abstract_params):
        return abstract_params
    folder = (Best if best and best_record(workdir) else Checkpoints)(workdir, reading=True)
    params = folder.restore_params(abstract_params)
    folder.close()
    return params
