"""Finds the files of a run after its workdir, its data or the repository has moved.

A configured path is tried as given, relative to the current folder; if it is the path the run was
made with, also at its former absolute location and relative to the workdir (`places.json`). The
workdir has copies of label table, split, groups and few-shot list. Files whose content has changed
are refused.
"""

import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pgpsam_jax.checkpointing import frozen_weights
from pgpsam_jax.checkpointing.identity import CONTENT_DIGESTS, PATHS
from pgpsam_jax.config import serialization
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.models.sam import weights
from pgpsam_jax.models.sam.bases import locate
from pgpsam_jax.utils.files import StrPath, read_record, write_json

RECORD = "places.json"
LABELS, LIST, SPLIT, ORIGIN = "labels.json", "fewshot.txt", "split.json", "provenance.json"
GROUPS = "groups.json"
PARTS = ("train", "validation", "test")
_RECORDED = tuple(field for field in PATHS if not field.endswith("_glob"))
_NAME_BASE = (
    "name those with --base STEM (predict and report), --config.model.base=STEM (main) or "
    "load_run(workdir, base=STEM)"
)


def resolve_paths(
    config: ConfigDict, workdir: StrPath, root_flag: str = "--config.data.root"
) -> ConfigDict:
    """Returns a copy of a configuration with the present paths of a run's files.

    Args:
      config: the configuration with paths as given.
      workdir: of the run; without a `config.json` the configuration is copied unchanged.
      root_flag: the caller's flag for the data folder, for error messages.

    Raises:
      UserError: data or weights cannot be found, or the content of a file has changed.
    """
    config, workdir = config.copy_and_resolve_references(), Path(workdir)
    if not (workdir / "config.json").is_file():
        return config
    data, fewshot = config.data, config.fewshot
    candidates = _Candidates(config, workdir)
    data.root = _root(candidates("data.root"), data, workdir, root_flag)
    data.cache_dir = next(filter(os.path.isdir, candidates("data.cache_dir")), data.cache_dir)
    data.label_table = _file(candidates, "data.label_table", workdir / LABELS)
    if data.split == "file":
        data.split_file = _file(candidates, "data.split_file", workdir / SPLIT)
    data.group_file = _file(candidates, "data.group_file", workdir / GROUPS)
    fewshot.file = _file(candidates, "fewshot.file", workdir / LIST)
    config.model.base = find_base(config, workdir)
    config.model.cnn_base = _cnn(candidates("model.cnn_base"), workdir)
    return config


def find_base(config: ConfigDict, workdir: StrPath) -> str:
    """Returns the stem of the converted SAM that a run was trained on, "" if it needs none.

    Raises:
      UserError: `config.model.base` and the recorded locations do not lead to those weights.
    """
    given, wanted = config.model.base, (frozen_weights.pinned(workdir) or {}).get("sha256")
    if not given or wanted is None:
        return given
    paths = _Candidates(config, Path(workdir))("model.base")
    there = {path: digest for path in paths if (digest := weights.recorded_digest(path))}
    for path, digest in there.items():
        if digest == wanted:
            return path
    for path, digest in there.items():
        raise UserError(
            f"{workdir} was trained on SAM weights with SHA-256 {wanted}, but {path} has {digest}; "
            f"{_NAME_BASE}"
        )
    raise UserError(
        f"the SAM weights that {workdir} was trained on, with SHA-256 {wanted}, are not at "
        f"{' or '.join(paths)}; {_NAME_BASE}"
    )


def record_locations(workdir: StrPath, config: ConfigDict) -> None:
    """Stores where the files of a run are at this start; `config`: of `resolve_paths`."""
    locations, workdir = _read(workdir), Path(os.path.abspath(workdir))
    for field in _RECORDED:
        path = attrgetter(field)(config)
        if field == "model.base" and path:
            path = str(locate(path))  # it may be a name
        absolute = os.path.abspath(path)
        if path and Path(absolute).parent != workdir:  # not the workdir's copies
            beside = os.path.relpath(absolute, workdir)
            locations[field] = {"absolute": absolute, "from_workdir": beside}
    write_json(workdir / RECORD, locations)


class _Candidates:
    """Possible paths of a field's file, the most likely first; none for an empty field."""

    def __init__(self, config: ConfigDict, workdir: Path) -> None:
        self._config, self._workdir = config, workdir
        self._stored = serialization.load_config(workdir)
        self._locations = _read(workdir)

    def __call__(self, field: str) -> list[str]:
        given = attrgetter(field)(self._config)
        if not given:
            return []
        paths, location = [given], self._locations.get(field)
        if given == attrgetter(field)(self._stored) and isinstance(location, dict):
            paths.append(str(location.get("absolute", given)))
            beside = self._workdir / str(location.get("from_workdir", "."))
            paths.append(os.path.normpath(os.path.abspath(beside)))
        return list(dict.fromkeys(paths))


def _read(workdir: StrPath) -> dict[str, Any]:
    return read_record(Path(workdir) / RECORD, missing={})


def _root(paths: list[str], data: ConfigDict, workdir: Path, flag: str) -> str:
    for path in filter(os.path.isdir, paths):
        return path
    if not paths or data.layout == "phantom":  # generated if missing
        return data.root
    raise UserError(f"the data of {workdir} are not at {' or '.join(paths)}; give {flag}=FOLDER")


def _file(candidates: _Candidates, field: str, own: Path) -> str:
    """First existing file with the content of the workdir's copy `own`, else that copy."""
    paths = candidates(field)
    there = [path for path in paths if os.path.lexists(path)]
    if not paths or not own.is_file():
        return (there or paths or [""])[0]
    if not there:
        return str(own)
    digest = CONTENT_DIGESTS[field]
    wanted = digest(own)
    same = [path for path in there if digest(path) == wanted]
    # The order of a split changes its digest, and groups may be those of more cases than the run
    # has; `resumption.check_split` compares the parts.
    if field in ("data.split_file", "data.group_file"):
        return str(own) if same else there[0]
    if same:
        return same[0]
    raise UserError(
        f"{there[0]} ({field}) has {_OTHER[field]} than the run in {own.parent} started with; "
        f"give the run's copy, --config.{field}={own}, or train in another --workdir"
    )


_OTHER = {"data.label_table": "other classes or source ids", "fewshot.file": "other slices"}


def _cnn(paths: list[str], workdir: Path) -> str:
    """Prefers the file the run was trained with; training compares it on resume."""
    wanted = read_record(workdir / ORIGIN, missing={}).get("cnn_base")
    there = [path for path in paths if resnet_weights.cnn_file(path).is_file()]
    right = [path for path in there if resnet_weights.digests(path)["cnn_base"] == wanted]
    return (right or there or paths or [""])[0]
