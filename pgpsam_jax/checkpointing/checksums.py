"""SHA-256 manifest of a checkpoint folder."""

from collections.abc import Iterable
from pathlib import Path

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import StrPath, file_digest, read_record, write_json

FILE = "sha256.json"


def write(folder: StrPath) -> None:
    """Writes the SHA-256 of each file of a complete folder to its manifest."""
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths if path != folder / FILE]
    write_json(folder / FILE, {name: file_digest(folder / name) for name in names})


def check(folder: StrPath, parts: Iterable[str]) -> None:
    """Compares the files under the subfolders `parts` with the manifest.

    A folder without a manifest passes: its run was killed before writing one.

    Raises:
      UserError: a file is damaged or missing; the caller adds the folder's name.
    """
    folder, parts = Path(folder), tuple(parts)
    if not (folder / FILE).is_file():
        return
    record = read_record(folder / FILE, damaged=None)
    if record is None:
        raise UserError(f"{FILE} is damaged")
    for name, digest in record.items():
        if not name.startswith(parts):
            continue
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing")
        if file_digest(folder / name) != digest:
            raise UserError(f"{name} has changed since it was written")
