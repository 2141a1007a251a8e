"""Layout of paired image and label globs."""

import os
import re
from pathlib import Path, PurePosixPath

from pgpsam_jax.data.io.volume_files import entries, named_alike
from pgpsam_jax.data.layouts.cases import Listing, check_root, pair, safe_case_id
from pgpsam_jax.errors import UserError


def scan(root: Path, image_glob: str | None, label_glob: str | None) -> Listing:
    """Returns the cases matched by the globs.

    Args:
        root: folder of the data set.
        image_glob: path relative to `root`. Its one `*` stands for the case id; without a `*` it
            names a single case, called after the folder of the image.
        label_glob: the same for labels; None for images without labels.
    """
    if not image_glob:
        raise UserError("layout pairs needs an image_glob such as images/*.nii.gz")
    check_root(root, f"expected a folder that holds {image_glob}")
    images, folders = _glob(root, image_glob)
    if label_glob is None:
        listing = pair(images, None, root, f"expected {image_glob}")
        labels: list[tuple[str, Path]] = []
    else:
        if ("*" in image_glob) != ("*" in label_glob):
            raise UserError(f"{image_glob!r} and {label_glob!r} must both hold one * or both none")
        labels, more = _glob(root, label_glob)
        if "*" not in image_glob and images and labels:
            labels = [(images[0][0], labels[0][1])]
        listing = pair(images, labels, root, f"expected {image_glob} and {label_glob}")
        folders |= more
    for folder in sorted(folders):
        listing.note_skipped(folder, [path for _, path in images + labels])
    return listing


def _glob(root: Path, pattern: str) -> tuple[list[tuple[str, Path]], set[Path]]:
    """Returns (case id, path) of each match, and the folder of the `*` if it stands for files.

    Hidden entries, which tools leave behind, are skipped. Suffixes match in any case.
    """
    parts = PurePosixPath(pattern).parts
    if pattern.startswith("/") or ".." in parts or re.search(r"[?\[\]]|\*.*\*", pattern):
        raise UserError(f"{pattern!r} must be relative to {root}, without .., with at most one *")
    if "*" not in pattern:
        path = named_alike(root / pattern)
        there = os.path.lexists(path)
        return [(safe_case_id(path.resolve().parent.name), path)] if there else [], set()
    place = next(i for i, part in enumerate(parts) if "*" in part)
    folder, (part, *below) = root.joinpath(*parts[:place]), parts[place:]
    head, tail = part.split("*")
    known = (".nii.gz", ".nii", ".img.gz", ".img", ".hdr.gz", ".hdr")
    suffix = next((suffix for suffix in known if tail.lower().endswith(suffix)), "")
    tail = tail[: len(tail) - len(suffix)]
    wanted = re.compile(
        re.escape(head) + r"([^.].*)" + re.escape(tail) + f"(?i:{re.escape(suffix)})", re.DOTALL
    )
    found = []
    for entry in entries(folder) if folder.is_dir() else ():
        match = wanted.fullmatch(entry.name)
        path = named_alike(entry.joinpath(*below))
        if match and os.path.lexists(path) and (below or suffix or path.is_file()):
            found.append((safe_case_id(match[1]), path))
    return found, set() if below else {folder}
