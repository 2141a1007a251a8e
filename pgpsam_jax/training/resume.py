"""Whether a workdir holds this run already, and what it means for the run to be longer."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import checkpoint, identity
from pgpsam_jax.checkpointing.locations import LIST
from pgpsam_jax.checkpointing.resumption import compare
from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.data.dataset import Split, stored_list
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.training.plan import TrainingPlan


def is_resume(config: ConfigDict, workdir, split: Split) -> bool:
    """Whether the workdir holds this run; one that cannot go on as it began is refused.

    config: of `places.found`. A run that is to take more steps than before goes on too, and it is
    said what that means.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        if checkpoint.numbers(workdir):
            raise UserError(
                f"{workdir} holds checkpoints but no config.json; restore it from a copy, or "
                "choose another --workdir"
            )
        return False
    stored = configuration.load_config(workdir)
    identity.check_same(stored, config, workdir, free=identity.LENGTH)
    if not (workdir / LIST).is_file():
        raise UserError(
            f"{workdir / LIST} is missing; restore it from a copy (a workdir that was converted "
            "from a checkpoint has none: use --mode evaluate, or train in another --workdir)"
        )
    compare(workdir, split)
    plans = TrainingPlan.of(stored), TrainingPlan.of(config)
    _check_length(*plans, config.validation.every_epochs, workdir)
    return True


def _check_length(old: TrainingPlan, new: TrainingPlan, every_epochs: int, workdir: Path) -> None:
    """Refuses fewer steps than the run began with; prints what more of them mean."""
    slices = len(stored_list(workdir))
    before, now = old.total_steps(slices), new.total_steps(slices)
    if before == now:
        return
    done = max(checkpoint.numbers(workdir), default=0)
    if now < before:
        raise UserError(
            f"{workdir} belongs to a run of {before} steps, of which {done} are done: it cannot be "
            f"made one of {now}; give --config.train.steps={before} or more, or train in another "
            "--workdir"
        )
    said = [f"the run of {before} steps goes on from step {done} to step {now}"]
    rates = [plan.learning_rates(slices)[:done] for plan in (old, new)]
    if not np.array_equal(*rates, equal_nan=True):
        said.append(
            f"its learning rates so far were those of {before} steps, so what comes out is not "
            f"what one run of {now} steps gives"
        )
    if every_epochs and done == before and before * new.batch_size % (every_epochs * slices):
        said.append(f"validation judged step {before} as well, which was the last")
    multihost.print_once("; ".join(said))
