"""Which configuration fields identify a run, and which only locate its files.

Files are compared by content, not by path: when an experiment grid plans its cells (`contents`)
and when a run resumes (`locations`, `resumption`).
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pgpsam_jax.config import exclusive_fields, serialization
from pgpsam_jax.config.serialization import flatten
from pgpsam_jax.data.fewshot_list import read_list
from pgpsam_jax.data.layouts.groups import read_groups
from pgpsam_jax.data.layouts.label_table import load_label_table
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.baselines import resnet_weights
from pgpsam_jax.models.sam import weights
from pgpsam_jax.utils.files import StrPath, file_digest
from pgpsam_jax.utils.untrusted_text import read_user_json

# Paths: their targets may move between starts.
DATA = ("data.root", "data.image_glob", "data.label_glob")
PATHS = (
    *DATA,
    "data.label_table",
    "data.split_file",
    "data.group_file",
    "data.cache_dir",
    "fewshot.file",
    "model.base",
    "model.cnn_base",
)
SPLIT = (
    "data.split",
    "data.split_seed",
    "data.test_fraction",
    "data.validation_fraction",
    "data.folds",
    "data.fold",
    "data.group",
)
LIST = ("fewshot.rule", "fewshot.seed", *(f"fewshot.{size}" for size in exclusive_fields.SIZES))
LENGTH = ("train.epochs", "train.steps")

# Change how a run computes or how often it reports, not its result.
_MANNER = (
    "deterministic",
    "mesh.",
    "log.",
    "data.resident_gib",
    "data.max_gib",
    "data.verify",
    "validation.dead_epochs",
    "model.attention",
    "model.remat",
    "model.scan_blocks",
)
# May differ between a run and its resumption.
FREE_ON_RESUME = (*_MANNER, *PATHS, "eval.")
NO_IDENTITY = (*_MANNER, *PATHS, "name", "eval.overlays", "eval.workers")


def content_digests(config: dict[str, Any]) -> dict[str, str | None]:
    """Returns field -> SHA-256 of the file it names, or None where that cannot be read from here.

    The data set is not included: its digest is compared when a run resumes.
    """
    fields, found = flatten(config), {}
    for field in sorted(given_files(config)):
        try:
            found[field] = CONTENT_DIGESTS[field](fields[field])
        except (UserError, OSError):
            found[field] = None
    return found


def given_files(config: dict[str, Any]) -> set[str]:
    """Returns the fields of a configuration (as JSON) that name a file with a content digest."""
    fields = flatten(config)
    return {field for field in CONTENT_DIGESTS if fields.get(field)}


def _of_value(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_split(path: StrPath) -> str:
    value = read_user_json(path, "split file")
    parts = value.items() if isinstance(value, dict) else ()
    return _of_value({part: sorted(map(str, ids)) for part, ids in parts})


def _of_cnn(path: StrPath) -> str:
    file = resnet_weights.cnn_file(path)
    return _file(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _file(file: Path, _: int) -> str:
    return file_digest(file)


# Field -> SHA-256 of its file by meaning; None for missing weights.
CONTENT_DIGESTS = {
    "data.label_table": lambda path: _of_value(load_label_table(path).to_json()),
    "data.split_file": _of_split,
    "data.group_file": lambda path: _of_value(read_groups(path)),
    "fewshot.file": lambda path: read_list(path).hash,
    "model.base": weights.recorded_digest,
    "model.cnn_base": _of_cnn,
}


def fingerprint(config: ConfigDict) -> str:
    """Returns the SHA-256 of all settings that determine a result: equal for equal runs."""
    fields = flatten(serialization.to_json(config))
    held = {
        field: digest or fields[field]
        for field, digest in content_digests(config.to_dict()).items()
    }
    fields = {k: v for k, v in fields.items() if not k.startswith(NO_IDENTITY)}
    return _of_value(fields | held)


def differences(
    stored: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...] = PATHS
) -> list[str]:
    """Describes the fields in which two configurations (as JSON) differ.

    Args:
      stored, ours: the earlier and the present configuration.
      free: prefixes of fields that may differ.
    """
    stored, ours = flatten(stored), flatten(ours)
    return [
        f"{key}: {stored.get(key)!r} there, {ours.get(key)!r} now"
        for key in sorted(stored.keys() | ours.keys())
        if stored.get(key) != ours.get(key) and not key.startswith(free)
    ]


def check_same(
    stored: ConfigDict, ours: ConfigDict, workdir: StrPath, free: tuple[str, ...] = ()
) -> None:
    """Checks that a configuration describes the run that a workdir holds.

    The split may differ if the workdir has a copy to compare it with, and the few-shot rule if a
    list is given.

    Args:
      stored, ours: the workdir's and the present configuration.
      workdir: of the run.
      free: further fields that may differ.

    Raises:
      UserError: names the fields that differ.
    """
    free += FREE_ON_RESUME
    if (Path(workdir) / "split.json").is_file():
        kinds = {config.data.split == "within_volume" for config in (stored, ours)}
        free += SPLIT if len(kinds) == 1 else SPLIT[1:]
    else:
        free = tuple(field for field in free if field != "data.split_file")
    if ours.fewshot.file:
        free += LIST
    different = differences(serialization.to_json(stored), serialization.to_json(ours), free)
    for field in ("fewshot.file", "model.cnn_base"):  # no content to compare
        section, name = field.split(".")
        if stored[section][name] and not ours[section][name]:
            different.append(f"{field}: {stored[section][name]!r} there, none now")
    if different:
        raise UserError(
            f"{workdir} belongs to a run with another configuration ({'; '.join(different)}); "
            "choose another --workdir or the same settings"
        )
