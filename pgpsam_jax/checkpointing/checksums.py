"""The hashes of a folder's files, kept in it: a byte that changes later is noticed."""

import json
from collections.abc import Iterable
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import file_digest, write_json

FILE = "sha256.json"


def write(folder) -> None:
    """Record the SHA-256 of every file of a folder that is complete."""
    folder = Path(folder)
    write_json(folder / FILE, {name: file_digest(folder / name) for name in _files(folder)})


def check(folder, parts: Iterable[str]) -> None:
    """Compare what lies in some of a folder's sub-folders with what was recorded.

    A folder without a record, of a run that was killed before it could write one, passes. Raises
    a `UserError`, to be told with the folder's name, where a file is damaged or missing.
    """
    folder, parts = Path(folder), tuple(parts)
    if not (folder / FILE).is_file():
        return
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        wanted = {name: digest for name, digest in record.items() if name.startswith(parts)}
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{FILE} is damaged") from None
    for name, digest in wanted.items():
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing")
        if file_digest(folder / name) != digest:
            raise UserError(f"{name} is not what was written")


def _files(folder: Path) -> list[str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) != FILE]
