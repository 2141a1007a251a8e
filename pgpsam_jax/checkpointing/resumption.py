"""Records which run a workdir holds, and checks that a resumed run is still that run."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import identity, locations
from pgpsam_jax.checkpointing.locations import GROUPS, LABELS, LIST, ORIGIN, PARTS, SPLIT
from pgpsam_jax.config import serialization
from pgpsam_jax.data.dataset import Split, images_digest
from pgpsam_jax.data.fewshot_list import FewShotList
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.distributed import multihost
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import StrPath, read_record, write_json

_INPUTS = {
    "list": "few-shot list",
    "data": "training data",
    "validation": "validation data",
    "test": "images of the test cases",
    "cnn_base": "file of model.cnn_base",
}


def check_split(workdir: StrPath, split: Split) -> None:
    """Checks that split and label table are those the run started with.

    Raises:
      UserError: a case has moved to another part of the split, or the label table differs.
    """
    labels = Path(workdir) / LABELS
    if labels.is_file() and load_label_table(labels).to_json() != split.table.to_json():
        raise UserError(
            f"{labels} has other classes or source ids than the data have now; give the run's "
            f"label table, --config.data.label_table={labels}, or choose another --workdir"
        )
    path = Path(workdir) / SPLIT
    if not path.is_file():  # written by a version without split records
        return
    then, now = _parts_by_case(read_record(path)), _parts_by_case(_ids(split))
    changed = [
        f"{case}: {then.get(case, 'in no part')} then, {now.get(case, 'in no part')} now"
        for case in sorted(then.keys() | now.keys())
        if then.get(case) != now.get(case)
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"the split has changed since the run in {workdir} started ({'; '.join(changed[:5])}"
            f"{more}); restore the data, or give the run's own split with --config.data.split=file "
            f"--config.data.split_file={path}, or train in another --workdir"
        )


def notice(workdir: StrPath, split: Split) -> str | None:
    """Returns a notice if the test images are not those present when the run started."""
    then = read_record(Path(workdir) / ORIGIN, missing={}).get("test")
    if then in (None, images_digest(split.test)):
        return None
    return "The scored test images have changed since this run started (SHA-256)."


def _ids(split: Split) -> dict[str, list[str]]:
    """The split in the format of `data.split_file`."""
    ids = {part: [case.case_id for case in getattr(split, part)] for part in PARTS}
    return {part: cases for part, cases in ids.items() if cases}


def _groups(split: Split) -> dict[str, str]:
    """The known groups in the format of `data.group_file`."""
    cases = [case for part in PARTS for case in getattr(split, part)]
    return {case.case_id: case.group for case in cases if case.group}


def _parts_by_case(ids: dict[str, Any]) -> dict[str, str]:
    """Case -> the parts of the split that contain it."""
    found: dict[str, str] = {}
    for part in PARTS:
        for case in ids.get(part, ()):
            found[case] = f"{found[case]} and {part}" if case in found else part
    return found


def record_run_identity(
    given: ConfigDict,
    config: ConfigDict,
    workdir: StrPath,
    split: Split,
    slices: FewShotList,
    origin: dict[str, Any],
) -> None:
    """Writes which run a workdir holds; on resume, checks the inputs first.

    `config.json` is written last: it marks the workdir as this run's.

    Args:
      given: the configuration with paths as the user wrote them.
      config: of `locations.resolve_paths`.
      workdir: of the run.
      split: of the data set.
      slices: the few-shot list.
      origin: of `provenance.provenance`.

    Raises:
      UserError: an input has changed since the run started.
    """
    if not multihost.is_first():
        return
    workdir = Path(workdir)
    resume = (workdir / "config.json").is_file()
    if resume:
        _check_inputs(workdir / ORIGIN, origin)
        stored = serialization.load_config(workdir)
        # Paths and the length of the run may change on resume.
        for section, name in (field.split(".") for field in (*identity.PATHS, *identity.LENGTH)):
            length = f"{section}.{name}" in identity.LENGTH
            if length or (stored[section][name] and given[section][name]):
                stored[section][name] = given[section][name]
        given = stored
    else:
        slices.write(workdir / LIST)
    copies = {LABELS: split.table.to_json(), SPLIT: _ids(split)}
    copies |= {GROUPS: groups} if (groups := _groups(split)) else {}
    for name, value in copies.items():
        if not resume or not (workdir / name).is_file():
            write_json(workdir / name, value)
    write_json(workdir / ORIGIN, origin)
    locations.record_locations(workdir, config)
    serialization.save_config(given, workdir)


def _check_inputs(path: Path, origin: dict[str, Any]) -> None:
    """Refuses inputs that have changed since the start; warns if the code has."""
    before = read_record(path, missing={})
    for name, what in _INPUTS.items():
        then, now = before.get(name), origin.get(name)
        if then and now and then != now:
            raise UserError(
                f"the {what} has changed since the run in {path.parent} started ({then[:12]} then, "
                f"{now[:12]} now, by SHA-256); restore it, or train in another --workdir"
            )
    changed = [k for k in ("code", "packages") if before.get(k) not in (None, origin[k])]
    if changed:
        multihost.print_once(
            f"warning: {' and '.join(changed)} changed since this run started; it resumes, but "
            "not bit for bit as it would have"
        )
