"""What every layout gives: cases with safe ids, images paired with labels, and what is amiss."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pgpsam_jax.data.arrays import ArrayFiles
from pgpsam_jax.data.findings import ERROR, Finding
from pgpsam_jax.errors import UserError
from pgpsam_jax.text_files import shown

_LONGEST = 150  # characters of a case id: names of files are made of it

Source = Path | ArrayFiles  # what `volumes` reads


@dataclass(frozen=True)
class Case:
    """One patient's volume; `case_id` is safe in a file name.

    `part` is "train" or "test" where the layout itself splits the data, else empty.
    """

    case_id: str
    image: Source
    label: Source | None = None
    part: str = ""


@dataclass
class Listing:
    """All cases of a data set, sorted by id, and what is wrong with their files' names.

    `expected` says what the layout looks like.
    """

    cases: list[Case]
    findings: list[Finding] = field(default_factory=list)
    expected: str = ""

    def add(self, code: str, file, message: str, level: str = ERROR) -> None:
        self.findings.append(Finding(level, code, str(file), message))

    @property
    def errors(self) -> list[str]:
        """The messages of the findings that forbid to use the data."""
        return [finding.message for finding in self.findings if finding.level == ERROR]


def safe_case_id(text: str) -> str:
    """A case id of [A-Za-z0-9_.-] that cannot leave its folder; other characters become `_`."""
    result = re.sub(r"[^A-Za-z0-9_.-]", "_", text).lstrip(".")
    if not result or len(result) > _LONGEST:
        raise UserError(
            f"cannot make a case id of {text[:80]!r} (a name of 1 to {_LONGEST} characters); "
            "rename the file"
        )
    return result


def inside(root: Path, text, where: str) -> Path:
    """`root / text` for a relative path without `..`; what a list names must not lead elsewhere."""
    parts = re.split(r"[/\\]", text) if isinstance(text, str) else [".."]
    long = isinstance(text, str) and (len(text) > 1000 or max(map(len, parts)) > 200)
    if long or not text or ".." in parts or not parts[0] or re.search(r"[:\x00-\x1f]", text):
        raise UserError(
            f"{where} names {shown(repr(text)[:200], 80)}, which is no path inside the data set; "
            "give relative names without .."
        )
    return root.joinpath(*parts)


def check_root(root: Path, expected: str) -> None:
    """Refuse a data folder that is not there."""
    if not root.is_dir():
        what = "is a file" if root.is_file() else "does not exist"
        raise UserError(f"data folder {root} {what}: {expected}")


def pair(images, labels, root: Path, expected: str, part: str = "") -> Listing:
    """Listing of (case id, source) pairs, matched by id, never by position.

    `labels` None means images without labels.
    """
    if not images:
        raise UserError(f"no images found in {root}: {expected}")
    partners = dict(labels or ())
    listing = Listing(
        sorted(
            (Case(case_id, image, partners.get(case_id), part) for case_id, image in images),
            key=lambda case: case.case_id,
        ),
        expected=expected,
    )
    own = dict(images)
    if labels is not None:
        for case_id in sorted(own.keys() - partners.keys()):
            listing.add("missing_pair", own[case_id], f"label of {case_id} is missing")
        for case_id in sorted(partners.keys() - own.keys()):
            listing.add("missing_pair", partners[case_id], f"image of {case_id} is missing")
    for kind, found in (("image", images), ("label", labels or ())):
        for case_id, number in Counter(case_id for case_id, _ in found).items():
            if number > 1:
                files = ", ".join(source.name for i, source in found if i == case_id)
                listing.add(
                    "duplicate_id",
                    own.get(case_id, partners.get(case_id)),
                    f"there are several {kind} files for case {case_id} ({files}), keep one",
                )
    return listing
