"""Whether a workdir holds a run already, and whether what goes on there would be the same run."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import checkpoint, locations
from pgpsam_jax.checkpointing.locations import LABELS, LIST, ORIGIN, PARTS, SPLIT
from pgpsam_jax.config import identity
from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.data.dataset import Split, images_digest, stored_list
from pgpsam_jax.data.fewshot_list import FewShotList
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.methods import build
from pgpsam_jax.results.runs import read_json
from pgpsam_jax.training import model_selection
from pgpsam_jax.utils.files import write_json

_INPUTS = {
    "list": "few-shot list",
    "data": "training data",
    "validation": "validation data",
    "test": "images of the test cases",
    "cnn_base": "file of model.cnn_base",
}


def goes_on(config: ConfigDict, workdir, split: Split) -> bool:
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
    _lengthen(stored, config, workdir)
    return True


def compare(workdir, split: Split) -> None:
    """Refuse cases on another side than when the run began, and another label table."""
    labels = Path(workdir) / LABELS
    if labels.is_file() and load_label_table(labels).to_json() != split.table.to_json():
        raise UserError(
            f"{labels} has other classes or source ids than the data now; give the label table of "
            f"that run, --config.data.label_table={labels}, or choose another --workdir"
        )
    path = Path(workdir) / SPLIT
    if not path.is_file():  # of a run that was begun before there was one
        return
    then, now = _sides(read_json(path)), _sides(_ids(split))
    changed = [
        f"{case}: {then.get(case, 'in no part')} then, {now.get(case, 'in no part')} now"
        for case in sorted(then.keys() | now.keys())
        if then.get(case) != now.get(case)
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"the split has changed since the run in {workdir} began ({'; '.join(changed[:5])}"
            f"{more}); restore the data, or give the run's own split with --config.data.split=file "
            f"--config.data.split_file={path}, or train in another --workdir"
        )


def notice(workdir, split: Split) -> str | None:
    """What to know of scores of other images than those that were there when the run began."""
    then = (read_json(Path(workdir) / ORIGIN) or {}).get("test")
    if then in (None, images_digest(split.test)):
        return None
    return "The scored images are not those of the test cases when this run began, by SHA-256."


def _ids(split: Split) -> dict[str, list[str]]:
    """The split as `data.split_file` has it."""
    ids = {part: [case.case_id for case in getattr(split, part)] for part in PARTS}
    return {part: cases for part, cases in ids.items() if cases}


def _sides(ids: dict) -> dict[str, str]:
    """Case -> the parts that it is in."""
    found = {}
    for part in PARTS:
        for case in ids.get(part, ()):
            found[case] = f"{found[case]} and {part}" if case in found else part
    return found


def _lengthen(stored: ConfigDict, config: ConfigDict, workdir: Path) -> None:
    """Refuse fewer steps than the run was begun with; say what more of them mean."""
    slices = len(stored_list(workdir))
    before, now = (build.total_steps(c, slices) for c in (stored, config))
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
    rates = [build.learning_rates(c, slices)[:done] for c in (stored, config)]
    if not np.array_equal(*rates, equal_nan=True):
        said.append(
            f"its learning rates so far were those of {before} steps, so what comes out is not "
            f"what one run of {now} steps gives"
        )
    epoch = config.validation.every_epochs * slices
    if (
        model_selection.is_on(config)
        and done == before
        and before * config.train.batch_size % epoch
    ):
        said.append(f"validation judged step {before} as well, which was the last")
    multihost.say("; ".join(said))


def claim(
    given: ConfigDict, config: ConfigDict, workdir, split: Split, slices: FewShotList, origin: dict
) -> None:
    """Write what says which run the workdir holds; on resume, what is there must agree.

    given: the configuration with paths as users wrote them; config: of `places.found`. origin:
    `provenance.provenance`. `config.json` comes last: it makes the workdir this run's.
    """
    if not multihost.is_first():
        return
    workdir = Path(workdir)
    resume = (workdir / "config.json").is_file()
    if resume:
        _compare(workdir / ORIGIN, origin)
        given = _updated(configuration.load_config(workdir), given)
    else:
        slices.write(workdir / LIST)
    for name, value in ((LABELS, split.table.to_json()), (SPLIT, _ids(split))):
        if not resume or not (workdir / name).is_file():
            write_json(workdir / name, value)
    write_json(workdir / ORIGIN, origin)
    locations.record(workdir, config)
    configuration.store(given, workdir)


def _updated(stored: ConfigDict, given: ConfigDict) -> ConfigDict:
    """The stored configuration with what may change where a run goes on: places, and its length."""
    for field in (*identity.PLACES, *identity.LENGTH):
        section, name = field.split(".")
        if field in identity.LENGTH or (stored[section][name] and given[section][name]):
            stored[section][name] = given[section][name]
    return stored


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
        multihost.say(
            f"warning: {' and '.join(changed)} changed since this run began; it goes on, though "
            "not bit for bit as it would have"
        )
