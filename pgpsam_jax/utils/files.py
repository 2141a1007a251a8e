"""Atomic writes, digests, JSON, JSONL and CSV."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgpsam_jax.errors import UserError

StrPath = str | os.PathLike[str]

_PREFIX = ".tmp-"
_RAISE = object()
_DAMAGE = OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError
_KEPT = 40  # characters of up to 4 bytes; file systems limit names to 255 bytes
_WRITTEN = (  # by runs and grids, at the top of their folders
    "base.json best config.json cost.json evaluation fewshot.txt frozen.safetensors grid.json "
    "labels.json metrics.jsonl provenance.json slurm.sh timing.json training.png verify.json"
).split()
# `Path` collapses two slashes; a single letter would be a Windows drive.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local(path: StrPath, what: str) -> Path:
    """Returns the path; raises a `UserError` for an address such as gs://bucket/x."""
    if found := _ADDRESS.match(str(path)):
        if found[1].lower() == "file":
            how = "give the path itself, without file://"
        else:
            how = "mount it (gcsfuse, s3fs, rclone) or copy it, and give that folder or file"
        raise UserError(f"{what} {path} is an address, and only local paths are read; {how}")
    return Path(path)


def user_cache() -> Path:
    """Returns `$XDG_CACHE_HOME/pgpsam_jax`, by default in `~/.cache`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # unset, or relative, which the XDG specification ignores
        base = Path.home() / ".cache"
    return base / "pgpsam_jax"


@contextlib.contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yields a temporary path beside `path` with the same suffixes, renamed to it on success.

    The file gets the mode of the user's umask. An `OSError` names `path`.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = _beside(path)
        try:  # inside `try`: a signal may come as soon as the file exists
            handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # minus the umask
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.close(handle)
            yield name
            if stat.S_IMODE(name.stat().st_mode) != mode:  # a library has replaced the file
                name.chmod(mode)
            _to_disk(name)
            os.replace(name, path)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: StrPath) -> Iterator[Path]:
    """Yields a new folder beside `path`, renamed to it on success."""
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
    """Returns a new name in the same folder with the same suffixes, short enough for any system."""
    return path.with_name(f"{_PREFIX}{secrets.token_hex(6)}-{path.name[-_KEPT:]}")


@contextlib.contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Adds the file name to an `OSError` of the block; those of open files have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None or _PREFIX in str(error.filename):
            error.filename = str(path)
        raise


def _to_disk(name: Path) -> None:
    """Flushes a file; a power failure could otherwise leave the new name without content."""
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: StrPath) -> None:
    """Removes temporary files of killed writers from a folder tree, except from caches."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "cache"]  # other runs may write there
        for name in names:
            if name.startswith(_PREFIX):
                Path(place, name).unlink(missing_ok=True)


def refuse_foreign(folder: StrPath, marks: Iterable[str], kind: str) -> None:
    """Raises a `UserError` if a folder holds something else than a run or grid.

    Args:
        folder: may be missing or empty. Loose files such as logs are accepted, unless a run or
            grid would overwrite them.
        marks: names of files; a run or grid has at least one of them.
        kind: "run" or "grid", for the message.
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


def write_text(path: StrPath, text: str) -> None:
    with atomic_path(path) as temporary:
        # Keeps the bytes of file names that are not UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: StrPath, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Formats rows (dictionaries with these keys) as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def file_digest(path: StrPath, algorithm: str = "sha256") -> str:
    """Returns the hex digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def read_metrics(path: StrPath) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`, without lines cut off when a run was killed."""
    path, records = Path(path), []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def read_record(
    path: StrPath,
    parse: Callable[[dict[str, Any]], Any] = lambda value: value,
    *,
    missing: Any = None,
    damaged: Any = _RAISE,
    remedy: str = "restore it from a copy",
) -> Any:
    """Returns the content of a JSON file that this program wrote. For others: `read_user_json`.

    Args:
        path: the file, which holds a JSON object.
        parse: converts the object; may raise `LookupError`, `TypeError`, ... for wrong content.
        missing: returned if there is no file.
        damaged: returned if the file cannot be read or parsed.
        remedy: end of the error message.

    Raises:
        UserError: the file cannot be read or parsed, and `damaged` is not given.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return parse(value)
    except (FileNotFoundError, NotADirectoryError):
        return missing
    except _DAMAGE as error:
        if damaged is not _RAISE:
            return damaged
        raise UserError(f"{path} is damaged ({error!r}); {remedy}") from None
