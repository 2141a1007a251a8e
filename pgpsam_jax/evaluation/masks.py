"""A folder of predicted masks, with a record of the run behind each; other files are protected.

`predictions.json` holds `schema` 1; `runs`, {digest of the parameters: {"workdir", "labels"}};
`files`, {name of a mask: {"run", "input", "warnings", "voxels", "ml", "sha256"}}, the last three
once the mask is written: voxels and milliliters per organ, and the digest of the file.
`volumes.csv` has the milliliters as a table, `labels.json` the id of each class name.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import csv_text, file_digest, write_json, write_text
from pgpsam_jax.utils.untrusted_text import read_user_json, sanitize

RECORD, LABELS, VOLUMES = "predictions.json", "labels.json", "volumes.csv"
DICE = "dice.csv"  # where the masks were scored
SCHEMA = 1
_ENDS = (".nii", ".nii.gz")
_RUN_FILES = ("config.json", "grid.json", "checkpoints")
_EVERY_SECONDS = 2.0  # between writes of the record, which grows with the folder


class Masks:
    """The output folder of predicted masks.

    Args:
        folder: of the masks.
        inputs: {name without suffix: file}.
        previews: a PNG is written beside each mask.
        overwrite: allow replacing files that no run wrote (never the inputs).

    Raises:
        UserError: files that no run wrote would be replaced; nothing has been written.
    """

    def __init__(
        self, folder, inputs: Mapping[str, Path], *, previews: bool = False, overwrite: bool = False
    ):
        self.folder, self.inputs, self.overwrite = Path(folder), dict(inputs), overwrite
        self.previews = previews
        self._entries: dict[str, dict] = {}
        self._due = 0.0
        self._check_folder()
        self._record = self._read()
        if not overwrite:
            self._check_foreign_files()

    def name(self, stem: str) -> str:
        """File name of a mask."""
        return f"{stem}.nii.gz"

    def claim(self, run: Mapping, names: Sequence[str]) -> None:
        """Assigns the folder to a run, {"workdir", "parameters"}, with K class names.

        Raises:
            UserError: the folder holds masks of another run and `overwrite` is off, or masks with
                other class names would remain.
        """
        key, labels = run["parameters"], list(names)
        others = {
            name: self._record["runs"].get(entry["run"], {})
            for name, entry in self._record["files"].items()
            if entry["run"] != key and os.path.lexists(self.folder / name)
        }
        if others and not self.overwrite:
            there = next(iter(others.values())).get("workdir", "another run")
            raise UserError(
                f"{self.folder} holds masks of another run ({there}): {_name_list(others)}; choose "
                "another --output, or replace them with --overwrite"
            )
        replaced = {self.name(stem) for stem in self.inputs}
        remaining = [
            n for n, of in others.items() if n not in replaced and of.get("labels") != labels
        ]
        if remaining:
            raise UserError(
                f"{self.folder} holds masks of a run with other class names, which would remain: "
                f"{_name_list(remaining)}; choose another --output"
            )
        self._run, self._labels = key, labels
        self._record["runs"][key] = {"workdir": run["workdir"], "labels": labels}

    def done(self) -> list[str]:
        """Names of inputs whose masks this run wrote and which still exist."""
        files = self._record["files"]
        return [
            stem
            for stem in self.inputs
            if (entry := files.get(self.name(stem), {})).get("run") == self._run
            and "sha256" in entry
            and (self.folder / self.name(stem)).is_file()
        ]

    def begin(self, stems: Sequence[str]) -> None:
        """Records the masks to be written, so that they count as this run's if it is killed."""
        for stem in stems:
            entry = {"run": self._run, "input": str(self.inputs[stem]), "warnings": []}
            self._entries[self.name(stem)] = entry
        write_json(self.folder / LABELS, {name: i for i, name in enumerate(self._labels)})
        folded = {name.casefold() for name in self._entries}
        if len(folded) < len(self._entries) and (self.folder / LABELS.upper()).exists():
            raise UserError(
                f"{self.folder} is on a case-insensitive file system, and names of inputs differ "
                "only in case; rename them"
            )
        self._store()

    def add(self, stem: str, facts: Mapping, warnings: Sequence[str] = ()) -> None:
        """Records a written mask: the facts of `outputs.write_prediction`, and warnings."""
        self._entries[self.name(stem)] |= {"warnings": list(warnings), **facts}
        if time.monotonic() > self._due:
            self._store()

    def close(self) -> None:
        """Writes the record, without entries of missing masks, and the table of volumes."""
        self._store(drop_missing=True)
        heads = {organ: f"{organ} (ml)" for organ in self._labels[1:]}
        rows = [
            {"file": name} | {head: entry["ml"].get(organ) for organ, head in heads.items()}
            for name, entry in sorted(self._record["files"].items())
            if "ml" in entry
        ]
        write_text(self.folder / VOLUMES, csv_text(["file", *heads.values()], rows))

    def _store(self, drop_missing: bool = False) -> None:
        """Writes the record, merged with entries that another process of the run has added."""
        there = _valid_record(self.folder / RECORD) or self._record
        runs = self._record["runs"] if self.overwrite else there["runs"] | self._record["runs"]
        files = there["files"] | self._entries
        if drop_missing:
            files = {n: e for n, e in files.items() if os.path.lexists(self.folder / n)}
        used = {self._run, *(entry["run"] for entry in files.values())}
        runs = {key: run for key, run in runs.items() if key in used}
        self._record = {"schema": SCHEMA, "runs": runs, "files": files}
        write_json(self.folder / RECORD, self._record)
        self._due = time.monotonic() + _EVERY_SECONDS

    def _check_folder(self) -> None:
        """Refuses folders of runs and folders in which masks would overwrite inputs."""
        folder = self.folder
        if not folder.exists() and not folder.is_symlink():
            return
        if not folder.is_dir():
            raise UserError(f"--output {folder} is a file; give a folder for the masks")
        if found := [name for name in _RUN_FILES if (folder / name).exists()]:
            raise UserError(
                f"--output {folder} is the folder of a run or an experiment grid (it holds "
                f"{found[0]}); choose another --output"
            )
        for path in self.inputs.values():
            if file_id(path.parent) == file_id(folder):
                raise UserError(
                    f"{path} is in --output {folder}, where its mask would overwrite its input or "
                    "later be mistaken for one; choose another --output"
                )
        places = {file_id(path): path for path in self.inputs.values()}
        for stem in self.inputs:
            target = folder / self.name(stem)
            if target.exists() and (source := places.get(file_id(target))):
                raise UserError(
                    f"{target} is the same file as {source} and would overwrite its input; choose "
                    "another --output"
                )

    def _read(self) -> dict:
        record = _valid_record(self.folder / RECORD)
        if record is None and os.path.lexists(self.folder / RECORD) and not self.overwrite:
            raise UserError(
                f"{self.folder / RECORD} is not a record of predicted masks; choose another "
                "--output, or replace it with --overwrite"
            )
        return record or {"schema": SCHEMA, "runs": {}, "files": {}}

    def _check_foreign_files(self) -> None:
        """Refuses files that no run wrote, or that were changed since."""
        known, folder = self._record["files"], self.folder
        targets = [self.name(stem) for stem in self.inputs]
        there = os.listdir(folder) if folder.is_dir() else []
        masks = {n for n in there if n.lower().endswith(_ENDS) and n[0] != "."}
        changed = {n for n in targets if n in known and _changed(folder / n, known[n])}
        strange = sorted((masks - known.keys()) | changed)
        if self.previews:
            pictures = {n: n.removesuffix(".nii.gz") + ".png" for n in targets}
            strange += [p for n, p in pictures.items() if p in there and n not in known]
        if RECORD not in there:
            strange += [n for n in (LABELS, VOLUMES, DICE) if n in there]
        if strange:
            raise UserError(
                f"{folder} holds files that no run wrote (manual labels perhaps) or that were "
                f"changed since: {_name_list(strange)}; choose another --output, or replace "
                "conflicting ones with --overwrite"
            )


def _valid_record(path: Path) -> dict | None:
    """The record in a file; None if the file is not a valid record."""
    try:
        value = read_user_json(path, "record")
    except UserError:
        return None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return None
    runs, files = value.get("runs"), value.get("files")
    if not isinstance(runs, dict) or not isinstance(files, dict):
        return None
    whole = all(isinstance(e, dict) and isinstance(e.get("run"), str) for e in files.values())
    return value if whole and all(isinstance(r, dict) for r in runs.values()) else None


def _changed(path: Path, entry: dict) -> bool:
    """Whether a mask differs from its record; False for masks that were never finished."""
    try:
        return "sha256" in entry and file_digest(path) != entry["sha256"]
    except FileNotFoundError:
        return False


def file_id(path: Path):
    """Device and inode of a file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _name_list(names) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sanitize(name, 60) for name in names[:3]) + more
