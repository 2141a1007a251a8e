"""A folder of predicted masks: which run made each and what it found there; others' files stay.

`predictions.json` says it: `schema` 1; `runs`, {digest of the parameters: {"workdir", "labels"}};
`files`, {name of a mask: {"run", "input", "warnings", "voxels", "ml", "sha256"}}, the last three
once it is written: voxels and milliliters by organ, and the digest of the file. `volumes.csv` has
the milliliters as a table, `labels.json` the id of every name.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import csv_text, file_digest, write_json, write_text
from pgpsam_jax.utils.untrusted_text import read_json, shown

RECORD, LABELS, VOLUMES = "predictions.json", "labels.json", "volumes.csv"
SCHEMA = 1
_ENDS = (".nii", ".nii.gz")
_OF_A_RUN = ("config.json", "grid.json", "checkpoints")
_EVERY_SECONDS = 2.0  # the record grows with the folder, and is written whole


class Masks:
    """The folder `folder` for the masks of `inputs`, {name without suffix: file}.

    Raises a `UserError`, before anything is written, where files would be lost that no run wrote;
    with `overwrite` they may be, but for the inputs themselves. previews: a PNG beside each.
    """

    def __init__(
        self, folder, inputs: Mapping[str, Path], *, previews: bool = False, overwrite: bool = False
    ):
        self.folder, self.inputs, self.overwrite = Path(folder), dict(inputs), overwrite
        self.previews = previews
        self._entries, self._due = {}, 0.0
        self._refuse_places()
        self._record = self._read()
        if not overwrite:
            self._refuse_foreign()

    def name(self, stem: str) -> str:
        """The file of a mask."""
        return f"{stem}.nii.gz"

    def claim(self, run: Mapping, names: Sequence[str]) -> None:
        """Let the folder be that of a run: {"workdir", "parameters"} and its K class names.

        A `UserError` where it is another run's: without `overwrite`, and in any case where masks
        would stay that the names do not fit.
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
                f"{self.folder} holds masks of another run ({there}): {_listed(others)}; choose "
                "another --output, or replace them with --overwrite"
            )
        replaced = {self.name(stem) for stem in self.inputs}
        stay = [n for n, of in others.items() if n not in replaced and of.get("labels") != labels]
        if stay:
            raise UserError(
                f"{self.folder} holds masks of a run with other label names, which would stay: "
                f"{_listed(stay)}; choose another --output"
            )
        self._run, self._labels = key, labels
        self._record["runs"][key] = {"workdir": run["workdir"], "labels": labels}

    def done(self) -> list[str]:
        """Names of inputs whose masks this run wrote, and which are still there."""
        files = self._record["files"]
        return [
            stem
            for stem in self.inputs
            if (entry := files.get(self.name(stem), {})).get("run") == self._run
            and "sha256" in entry
            and (self.folder / self.name(stem)).is_file()
        ]

    def begin(self, stems: Sequence[str]) -> None:
        """Say which masks will be written now: should the process be killed, they are its own."""
        for stem in stems:
            entry = {"run": self._run, "input": str(self.inputs[stem]), "warnings": []}
            self._entries[self.name(stem)] = entry
        write_json(self.folder / LABELS, {name: i for i, name in enumerate(self._labels)})
        folded = {name.casefold() for name in self._entries}
        if len(folded) < len(self._entries) and (self.folder / LABELS.upper()).exists():
            raise UserError(
                f"{self.folder} does not tell capital letters from small ones, and the names of "
                "the inputs differ in nothing else; rename them"
            )
        self._store()

    def add(self, stem: str, facts: Mapping, warnings: Sequence[str] = ()) -> None:
        """A mask has been written: `outputs.write_prediction`'s facts, what was warned of."""
        self._entries[self.name(stem)] |= {"warnings": list(warnings), **facts}
        if time.monotonic() > self._due:
            self._store()

    def close(self) -> None:
        """Write the record and the table of volumes; entries of masks that are not there go."""
        self._store(gone=True)
        found = {n: e for n, e in self._record["files"].items() if "ml" in e}
        organs = [name for name in self._labels[1:]]
        columns = ["file", *(f"{organ} (ml)" for organ in organs)]
        rows = [
            {"file": name} | {f"{organ} (ml)": entry["ml"].get(organ) for organ in organs}
            for name, entry in sorted(found.items())
        ]
        write_text(self.folder / VOLUMES, csv_text(columns, rows))

    def _store(self, gone: bool = False) -> None:
        """Another process of the same run may have added to the record meanwhile."""
        there = _value(self.folder / RECORD) or self._record
        runs = self._record["runs"] if self.overwrite else there["runs"] | self._record["runs"]
        files = there["files"] | self._entries
        if gone:
            files = {n: e for n, e in files.items() if os.path.lexists(self.folder / n)}
        runs = {k: v for k, v in runs.items() if k == self._run or _made(files, k)}
        self._record = {"schema": SCHEMA, "runs": runs, "files": files}
        write_json(self.folder / RECORD, self._record)
        self._due = time.monotonic() + _EVERY_SECONDS

    def _refuse_places(self) -> None:
        """Places where masks must not be written at all."""
        folder = self.folder
        if not folder.exists() and not folder.is_symlink():
            return
        if not folder.is_dir():
            raise UserError(f"--output {folder} is a file; give a folder for the masks")
        if found := [name for name in _OF_A_RUN if (folder / name).exists()]:
            raise UserError(
                f"--output {folder} is the folder of a run or a grid (it holds {found[0]}); choose "
                "another --output"
            )
        for path in self.inputs.values():
            if _same(path.parent, folder):
                raise UserError(
                    f"{path} lies in --output {folder}, where its mask would overwrite its input "
                    "or be taken for one later; choose another --output"
                )
        places = {_place(path): path for path in self.inputs.values()}
        for stem in self.inputs:
            target = folder / self.name(stem)
            if target.exists() and (source := places.get(_place(target))):
                raise UserError(
                    f"{target} is the same file as {source} and would overwrite its input; choose "
                    "another --output"
                )

    def _read(self) -> dict:
        record = _value(self.folder / RECORD)
        if record is None and os.path.lexists(self.folder / RECORD) and not self.overwrite:
            raise UserError(
                f"{self.folder / RECORD} is no record of predicted masks; choose another --output, "
                "or replace it with --overwrite"
            )
        return record or {"schema": SCHEMA, "runs": {}, "files": {}}

    def _refuse_foreign(self) -> None:
        """Files that no run wrote, or that were changed since."""
        known, folder = self._record["files"], self.folder
        targets = [self.name(stem) for stem in self.inputs]
        there = os.listdir(folder) if folder.is_dir() else []
        masks = [n for n in there if n.lower().endswith(_ENDS) and n[0] != "."]
        strange = sorted({n for n in masks if n not in known} | {n for n in targets if n in known
                          and _changed(folder / n, known[n])})  # fmt: skip
        if self.previews:
            pictures = {n: n.removesuffix(".nii.gz") + ".png" for n in targets}
            strange += [p for n, p in pictures.items() if p in there and n not in known]
        if RECORD not in there:
            strange += [n for n in (LABELS, VOLUMES) if n in there]
        if strange:
            raise UserError(
                f"{folder} holds files that no run recorded as its own, manual labels perhaps, or "
                f"that were changed since: {_listed(strange)}; choose another --output, or replace "
                "those in the way with --overwrite"
            )


def _value(path: Path) -> dict | None:
    """The record in a file; None where it is none."""
    try:
        value = read_json(path, "record")
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
    """Whether a mask is not the one recorded; one that was never finished is nobody's."""
    try:
        return "sha256" in entry and file_digest(path) != entry["sha256"]
    except FileNotFoundError:
        return False


def _made(files: dict, run: str) -> bool:
    return any(entry["run"] == run for entry in files.values())


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _place(path: Path):
    """What two names of one file share; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _listed(names) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown(name, 60) for name in names[:3]) + more
