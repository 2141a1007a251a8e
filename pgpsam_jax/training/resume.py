"""Whether a workdir holds this run already, and whether its length may change."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import checkpoint, identity
from pgpsam_jax.checkpointing.locations import LIST
from pgpsam_jax.checkpointing.resumption import check_split
from pgpsam_jax.config import serialization
from pgpsam_jax.data.dataset import Split, stored_list
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.training.plan import TrainingPlan


def is_resume(config: ConfigDict, workdir, split: Split) -> bool:
    """Whether the workdir holds this run, to be resumed.

    A longer run than before resumes too; what that changes is printed.

    Args:
      config: of `locations.resolve_paths`.
      workdir: of the run.
      split: of the data set.

    Raises:
      UserError: the workdir holds another run or is incomplete, or the run got shorter.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        if checkpoint.saved_steps(workdir):
            raise UserError(
                f"{workdir} holds checkpoints but no config.json; restore it from a copy, or "
                "choose another --workdir"
            )
        return False
    stored = serialization.load_config(workdir)
    identity.check_same(stored, config, workdir, free=identity.LENGTH)
    if not (workdir / LIST).is_file():
        raise UserError(
            f"{workdir / LIST} is missing; restore it from a copy (a workdir that was converted "
            "from a checkpoint has none: use --mode evaluate, or train in another --workdir)"
        )
    check_split(workdir, split)
    plans = TrainingPlan.from_config(stored), TrainingPlan.from_config(config)
    _check_length(*plans, config.validation.every_epochs, workdir)
    return True


def _check_length(old: TrainingPlan, new: TrainingPlan, every_epochs: int, workdir: Path) -> None:
    """Refuses fewer steps than the run started with; prints what more of them change."""
    slices = len(stored_list(workdir))
    before, now = old.total_steps(slices), new.total_steps(slices)
    if before == now:
        return
    done = max(checkpoint.saved_steps(workdir), default=0)
    if now < before:
        raise UserError(
            f"{workdir} belongs to a run of {before} steps, {done} of them done: it cannot be "
            f"shortened to {now}; give --config.train.steps={before} or more, or train in another "
            "--workdir"
        )
    messages = [f"the run of {before} steps resumes from step {done} and continues to step {now}"]
    rates, others = (plan.learning_rates(slices)[:done] for plan in (old, new))
    if not np.array_equal(rates, others, equal_nan=True):
        messages.append(
            f"its learning rates so far were those of {before} steps, so the result differs from "
            f"that of one run of {now} steps"
        )
    if every_epochs and done == before and before * new.batch_size % (every_epochs * slices):
        messages.append(f"step {before} was validated as well, as the last step then")
    multihost.print_once("; ".join(messages))
