"""Small text and JSON files of users and data sets, which are untrusted."""

import json
from pathlib import Path
from typing import Any

from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.files import StrPath

MAX_BYTES = 64 << 20  # a list of a million slices has a third of that


def read_text(path: StrPath, what: str) -> str:
    """Returns the UTF-8 text of a regular file, without a byte order mark.

    Args:
        path: the file.
        what: start of the error message, such as "split file".

    Raises:
        UserError: the file is missing, too large or not text.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{what} {path} cannot be read: there is no such file; check the path")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{what} {path} is over {MAX_BYTES >> 20} MiB; it should be a short text file"
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} cannot be read: {error}; save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {path} cannot be read: {reason}; check the path") from None


def read_user_json(path: StrPath, what: str) -> Any:
    """Returns the value in a JSON file; raises a `UserError`, also for repeated keys."""
    try:
        return json.loads(read_text(path, what), object_pairs_hook=_object)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{what} {path} cannot be read as JSON: {reason}; correct it")


def sanitize(text: str, most: int = 100) -> str:
    """Makes text from a file safe for a message: one short line without control characters."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])
    return plain if len(text) <= most else f"{plain[:most]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.60} appears twice")
    return value
