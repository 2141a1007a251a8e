"""Whether a workdir holds a run already, and whether what goes on there would be the same run."""

from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax import checkpoint, distributed
from pgpsam_jax import config as configuration
from pgpsam_jax.data.fewshot import FewShotList
from pgpsam_jax.data.labels import LabelTable, load_label_table
from pgpsam_jax.errors import UserError
from pgpsam_jax.files import write_json
from pgpsam_jax.runs import read_json

LIST, LABELS, ORIGIN = "fewshot.txt", "labels.json", "provenance.json"
_INPUTS = {
    "list": "few-shot list",
    "data": "training data",
    "validation": "validation data",
    "cnn_base": "file of model.cnn_base",
}


def goes_on(config: ConfigDict, workdir, table: LabelTable) -> bool:
    """Whether the workdir holds this run; one that cannot go on as it began is refused."""
    workdir = Path(workdir)
    if not configuration.belongs_to(config, workdir):
        if checkpoint.numbers(workdir):
            raise UserError(
                f"{workdir} holds checkpoints but no config.json; restore it from a copy, or "
                "choose another --workdir"
            )
        return False
    if not (workdir / LIST).is_file():
        raise UserError(
            f"{workdir / LIST} is missing; restore it from a copy (a workdir that was converted "
            "from a checkpoint has none: use --mode evaluate, or train in another --workdir)"
        )
    labels = workdir / LABELS
    if labels.is_file() and load_label_table(labels).to_json() != table.to_json():
        raise UserError(
            f"{labels} has other classes or source ids than the data now; give the label table of "
            "that run, or choose another --workdir"
        )
    return True


def claim(
    config: ConfigDict, workdir, table: LabelTable, slices: FewShotList, origin: dict, resume: bool
) -> None:
    """Write what says which run the workdir holds; on resume, what is there must agree.

    origin: `provenance.provenance`. `config.json` comes last: it makes the workdir this run's.
    """
    if not distributed.is_first():
        return
    workdir = Path(workdir)
    if resume:
        _compare(workdir / ORIGIN, origin)
    else:
        slices.write(workdir / LIST)
    if not resume or not (workdir / LABELS).is_file():
        write_json(workdir / LABELS, table.to_json())
    write_json(workdir / ORIGIN, origin)
    if not resume:
        configuration.store(config, workdir)


def _compare(path: Path, origin: dict) -> None:
    """Refuse other inputs than those of the start; say where the program is another."""
    before = read_json(path) or {}
    for name, what in _INPUTS.items():
        then, now = before.get(name), origin.get(name)
        if then and now and then != now:
            raise UserError(
                f"the {what} has changed since the run in {path.parent} began ({then[:12]} then, "
                f"{now[:12]} now, by SHA-256); restore it, or train in another --workdir"
            )
    changed = [k for k in ("code", "packages") if before.get(k) not in (None, origin[k])]
    if changed:
        distributed.say(
            f"warning: {' and '.join(changed)} changed since this run began; it goes on, though "
            "not bit for bit as it would have"
        )
