"""Atomic writes and hashes, so that a killed run never leaves a half-written file."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

from pgpsam_jax.errors import UserError

_PREFIX = ".tmp-"
_KEPT = 40  # characters of a name, of up to 4 bytes; file systems know no names over 255 bytes
_WRITTEN = (  # by runs and grids, at the top of their folders
    "base.json best config.json cost.json evaluation fewshot.txt frozen.safetensors grid.json "
    "labels.json metrics.jsonl provenance.json slurm.sh timing.json training.png verify.json"
).split()
# A `Path` makes one slash of two; one letter would be a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local(path, what: str) -> Path:
    """The path; a `UserError` that names `what` where it is an address, such as gs://bucket/x."""
    if found := _ADDRESS.match(str(path)):
        if found[1].lower() == "file":
            how = "give the path itself, without file://"
        else:
            how = "mount it (gcsfuse, s3fs, rclone) or copy it, and give that folder or file"
        raise UserError(f"{what} {path} is an address, and only local paths are read; {how}")
    return Path(path)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` (same suffixes); renamed onto it only on success.

    It gets the mode that the user's umask gives, whatever is written by. An `OSError` names `path`.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = _beside(path)
        try:  # already here: a signal may come as soon as there is a file
            handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.close(handle)
            yield name
            if stat.S_IMODE(name.stat().st_mode) != mode:  # a library has made a file of its own
                name.chmod(mode)
            _to_disk(name)
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a new folder beside `path` to fill; renamed to it only on success."""
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = _beside(path)
        try:
            folder.mkdir()
            yield folder
            folder.rename(path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _beside(path: Path) -> Path:
    """A new name in the same folder with the same suffixes, short enough for any file system."""
    return path.with_name(f"{_PREFIX}{secrets.token_hex(6)}-{path.name[-_KEPT:]}")


@contextlib.contextmanager
def naming(path):
    """Have an `OSError` of the block name this file: one of a write to an open file names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None or _PREFIX in str(error.filename):
            error.filename = str(path)
        raise


def _to_disk(name) -> None:
    """Else a machine that loses power may be left with the new name and no content."""
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder) -> None:
    """Remove what writers that were killed left in a folder and below, its caches left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "cache"]  # other runs may write there
        for name in names:
            if name.startswith(_PREFIX):
                Path(place, name).unlink(missing_ok=True)


def refuse_foreign(folder, marks, kind: str) -> None:
    """A `UserError` where a folder has other things than a run or a grid (`kind`) in it.

    marks: names of which it would hold one. Loose files, such as logs, stay as they are unless
    they have a name that is written there.
    """
    folder = Path(folder)
    if not folder.is_dir() or any((folder / mark).exists() for mark in marks):
        return
    for path in sorted(folder.iterdir()):
        if path.name != "cache" and (path.is_dir() or path.name in _WRITTEN):
            raise UserError(
                f"{folder} holds {path.name} but is no {kind}; choose an empty or new folder for "
                "--workdir"
            )


def write_text(path, text: str) -> None:
    with atomic_path(path) as temporary:
        # Names of files that are no UTF-8 come out as the bytes that they are.
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def csv_text(columns, rows) -> str:
    """Rows (dictionaries with these keys) as CSV with a head line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def file_digest(path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def read_metrics(path) -> list[dict]:
    """Returns the records of a `metrics.jsonl`, without lines cut off when a run was killed."""
    path, records = Path(path), []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def read_json(path: Path) -> dict | None:
    """The object in a JSON file that a run wrote; None where there is no file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy") from None
    return value
