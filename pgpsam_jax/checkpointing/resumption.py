"""Whether a workdir holds a run already, and whether what goes on there would be the same run."""

from pathlib import Path

from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import identity, locations
from pgpsam_jax.checkpointing.locations import LABELS, LIST, ORIGIN, PARTS, SPLIT
from pgpsam_jax.config import serialization as configuration
from pgpsam_jax.data.dataset import Split, images_digest
from pgpsam_jax.data.fewshot_list import FewShotList
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import read_json, write_json

_INPUTS = {
    "list": "few-shot list",
    "data": "training data",
    "validation": "validation data",
    "test": "images of the test cases",
    "cnn_base": "file of model.cnn_base",
}


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
        stored = configuration.load_config(workdir)
        # Places of files, and the length of the run, may change when it resumes.
        for section, name in (field.split(".") for field in (*identity.PLACES, *identity.LENGTH)):
            length = f"{section}.{name}" in identity.LENGTH
            if length or (stored[section][name] and given[section][name]):
                stored[section][name] = given[section][name]
        given = stored
    else:
        slices.write(workdir / LIST)
    for name, value in ((LABELS, split.table.to_json()), (SPLIT, _ids(split))):
        if not resume or not (workdir / name).is_file():
            write_json(workdir / name, value)
    write_json(workdir / ORIGIN, origin)
    locations.record(workdir, config)
    configuration.store(given, workdir)


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
        multihost.print_once(
            f"warning: {' and '.join(changed)} changed since this run began; it goes on, though "
            "not bit for bit as it would have"
        )
