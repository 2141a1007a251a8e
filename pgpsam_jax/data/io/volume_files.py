"""Finds volume files in folders, for all layouts and programs.

Suffixes are `.nii`, `.nii.gz` and those of the two halves of a pair, `.img` and `.hdr`, optionally
gzipped, in any case. A pair is named by its `.img`. Hidden files, which tools leave behind, are
ignored.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pgpsam_jax.data.findings import BadFile
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import sanitize

_VOLUME = re.compile(r"(.+?)(\.nii|\.img|\.hdr)(\.gz)?", re.DOTALL | re.IGNORECASE)
_PARTNER = {".hdr": ".img", ".img": ".hdr"}
_LONGEST_NAME = 255  # bytes, on every common file system
_MASK = ".nii.gz"
_FORMATS = {".dcm": "DICOM file"}
_FORMATS |= dict.fromkeys((".mha", ".mhd"), "MetaImage file")
_FORMATS |= dict.fromkeys((".mgh", ".mgz"), "FreeSurfer file")
_FORMATS |= dict.fromkeys((".nrrd", ".nhdr"), "NRRD file")
_LOOKED_AT = 20  # files of a folder that are inspected for DICOM


class Inputs(NamedTuple):
    """Volumes to segment and volumes that cannot be used."""

    files: list[Path]
    faults: list[BadFile]
    skipped: str = ""  # counts the other entries by kind


def stem_of(path: Path) -> str:
    """Returns the file name without its volume suffix."""
    match = _VOLUME.fullmatch(path.name)
    return match[1] if match else path.name


def volumes_in(folder: Path) -> list[Path]:
    """Returns the entries named like volumes, sorted, without checking what they are.

    A pair is listed by its `.img`, or by its `.hdr` if that is alone. A missing folder is empty.
    """
    found = [path for path in entries(folder) if _kind(path)] if folder.is_dir() else []
    images = {stem_of(path) for path in found if _kind(path) == ".img"}
    return [path for path in found if _kind(path) != ".hdr" or stem_of(path) not in images]


def named_alike(path: Path) -> Path:
    """Returns the path or, if it does not exist, the volume of an equivalent name.

    Names are equivalent regardless of the case of their suffixes and of Unicode normalization.
    """
    if os.path.lexists(path) or not _kind(path):
        return path
    name = _plain(path)
    return next((other for other in volumes_in(path.parent) if _plain(other) == name), path)


def _plain(path: Path) -> str:
    stem = stem_of(path)
    return unicodedata.normalize("NFC", stem) + path.name.removeprefix(stem).lower()


def halves(path: Path) -> tuple[Path, ...]:
    """Returns the files of a volume: header and voxels of a pair, else the one file.

    Raises:
        BadFile: the other half of a pair is missing.
    """
    kind = _kind(path)
    if kind not in _PARTNER:
        return (path,)
    others = [path.with_name(stem_of(path) + _swapped(path.name.removeprefix(stem_of(path))))]
    if not others[0].exists():  # list the folder only if the halves have different names
        beside = entries(path.parent) if path.parent.is_dir() else []
        alike = [p for p in beside if stem_of(p) == stem_of(path)]
        others = [p for p in alike if _kind(p) == _PARTNER[kind]]
    if not others:
        raise BadFile(
            f"{path} is one half of a .hdr/.img pair, whose {_PARTNER[kind]} is missing; get "
            "it, or convert both to a single .nii.gz",
            "missing",
        )
    return (path, others[0]) if kind == ".hdr" else (others[0], path)


def check_entry(path: Path) -> None:
    """Raises `BadFile` unless the path is a regular file; opening a pipe would block forever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            raise BadFile(
                f"{path} is not a file but a broken link ({error.strerror}); get the file "
                "it points to, or remove the link",
                "missing",
            ) from None
        if isinstance(error, FileNotFoundError):
            raise BadFile(f"{path} is not a file; check the path", "missing") from None
        raise
    if stat.S_ISDIR(mode):
        raise BadFile(
            f"{path} is not a file but a folder named like one; rename it, or give what it holds",
            "missing",
        )
    if not stat.S_ISREG(mode):
        raise BadFile(
            f"{path} is not a file but a pipe, a socket or a device; remove it", "missing"
        )


def find_inputs(path) -> Inputs:
    """Returns the file itself, or the volumes of a folder; a `UserError` if there are none."""
    path = Path(path)
    if not path.is_dir():
        if not _kind(path):
            raise UserError(f"--input {path} is neither a NIfTI file nor a folder; check the path")
        if fault := _fault(path):
            raise UserError(f"--input {fault}")
        return Inputs([halves(path)[-1]], [])
    found = volumes_in(path)
    faults = {file: fault for file in found if (fault := _fault(file))}
    masks: dict[str, list[Path]] = {}
    for file in found:
        if file not in faults:
            masks.setdefault(stem_of(file), []).append(file)
    for alike in masks.values():
        faults |= {file: _clash(file, alike) for file in alike if len(alike) > 1}
    files = [file for file in found if file not in faults]
    rest = skipped_entries(path, found)
    if not found:
        rest = f" ({rest})" if rest else ""
        raise UserError(f"{path} holds no .nii or .nii.gz file{rest}; give a folder of volumes")
    return Inputs(files, list(faults.values()), rest)


def undecodable(path: Path) -> bool:
    """Whether the name is not valid UTF-8, as in archives of old systems."""
    return any("\ud800" <= character <= "\udfff" for character in path.name)


def skipped_entries(folder: Path, used: Iterable[Path]) -> str:
    """Returns a line that counts the entries of a folder not in `used`, by kind."""
    used = set(used)
    used |= {folder / half.name for path in used if _kind(path) for half in _known_halves(path)}
    rest: dict[str, list[str]] = {}
    for path in entries(folder) if folder.is_dir() else ():
        if path not in used:
            rest.setdefault(_described(path), []).append(sanitize(path.name, 40))
    if not rest:
        return ""
    parts = [_counted(kind, names) for kind, names in sorted(rest.items())]
    number = sum(map(len, rest.values()))
    count = "1 entry" if number == 1 else f"{number} entries"
    hint = "; dcm2niix converts DICOM" if any("DICOM" in kind for kind in rest) else ""
    where = sanitize(folder.name or str(folder), 60)
    return f"{count} of {where} skipped: {', '.join(parts)}{hint}"


def _fault(path: Path) -> BadFile | None:
    """Returns the problem of an input that shows before reading it, if any."""
    if undecodable(path):
        return BadFile(f"{path} has a name that is not UTF-8; rename it", "name")
    if len(os.fsencode(stem_of(path) + _MASK)) > _LONGEST_NAME:
        what = f"{path} has a name too long for its mask; shorten it to 200 bytes"
        return BadFile(what, "name")
    try:
        for half in halves(path):
            check_entry(half)
    except BadFile as fault:
        return fault
    except OSError as error:
        return BadFile(f"{path} cannot be read: {error.strerror or error}")
    return None


def _clash(path: Path, alike: list[Path]) -> BadFile:
    others = ", ".join(other.name for other in alike if other != path)
    return BadFile(
        f"{path} would write the same mask as {others}: several volumes have that "
        "name; keep one of each, or rename them",
        "name",
    )


def entries(folder: Path) -> list[Path]:
    """Returns the sorted entries of a folder; raises a `UserError` if it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"folder {folder} cannot be read: {error.strerror or error}; make it accessible"
        ) from None


def _kind(path: Path) -> str:
    """Returns `.nii`, `.img` or `.hdr`; empty for other names and hidden files."""
    match = _VOLUME.fullmatch(path.name)
    return match[2].lower() if match and path.name[0] != "." else ""


def _known_halves(path: Path) -> tuple[Path, ...]:
    try:
        return halves(path)
    except BadFile:
        return (path,)


def _swapped(suffix: str) -> str:
    """Swaps `.hdr` and `.img`, keeping `.GZ` and case."""
    other = _PARTNER[suffix[:4].lower()]
    return (other.upper() if suffix[:4].isupper() else other) + suffix[4:]


def _described(path: Path) -> str:
    if path.name[0] == ".":
        return "hidden file"
    if path.is_dir():
        return "DICOM folder" if _is_series(path) else "folder"
    return "other volume" if _kind(path) else _FORMATS.get(path.suffix.lower(), "other file")


def _is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files, by their suffix or magic bytes."""
    try:
        files = [path for path in sorted(folder.iterdir())[:_LOOKED_AT] if path.is_file()]
    except OSError:
        return False
    return any(path.suffix.lower() == ".dcm" or _has_mark(path) for path in files)


def _has_mark(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _counted(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {kind}{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"
