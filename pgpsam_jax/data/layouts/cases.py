"""What every layout gives: cases with safe ids, images paired with labels, and what is amiss."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pgpsam_jax.data.findings import ERROR, WARNING, Finding
from pgpsam_jax.data.io.array_files import ArrayFiles
from pgpsam_jax.data.io.volume_files import passed_over, undecodable
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import shown

_LONGEST_NAME = 255  # bytes that file systems allow
_LONGEST = 200  # bytes of a case id: names of files are made of it

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

    `expected` says what the layout looks like, `passed_over` counts the entries of its folders
    that are no data, one line for each folder.
    """

    cases: list[Case]
    findings: list[Finding] = field(default_factory=list)
    expected: str = ""
    passed_over: list[str] = field(default_factory=list)

    def pass_over(self, folder: Path, used: Iterable[Source | None]) -> None:
        """Count what else lies in a folder."""
        if line := passed_over(folder, [path for path in used if isinstance(path, Path)]):
            self.passed_over.append(line)

    def add(self, code: str, file, message: str, level: str = ERROR) -> None:
        self.findings.append(Finding(level, code, str(file), message))

    def check_names(self) -> None:
        """Warn of names that other programs and file systems do not tell apart or cannot show."""
        by_case: dict[str, list[Case]] = {}
        for case in self.cases:
            by_case.setdefault(case.case_id.casefold(), []).append(case)
            for source in (case.image, case.label):
                if isinstance(source, Path) and undecodable(source):
                    message = f"the name is no UTF-8, case {case.case_id} stands for it; rename it"
                    self.add("name", source, message, WARNING)
        for alike in by_case.values():
            ids = sorted({case.case_id for case in alike})
            if len(ids) > 1:
                message = (
                    f"cases {', '.join(ids)} differ by upper and lower case only: where a file "
                    "system does not tell them apart, one overwrites the other; rename one"
                )
                self.add("name", alike[0].image, message, WARNING)

    @property
    def errors(self) -> list[str]:
        """The messages of the findings that forbid to use the data."""
        return [finding.message for finding in self.findings if finding.level == ERROR]


def safe_case_id(text: str) -> str:
    """The case id of a patient's name: fit for a file name, the same in lists and of files.

    It keeps letters, digits and combining marks of all scripts and `_`, `.` and `-`, composed
    (NFC); other characters become `_`. Of long names a hash stands for the rest.
    """
    composed = unicodedata.normalize("NFC", text)
    safe = "".join(c if c in "_.-" or _is_letter(c) else "_" for c in composed).lstrip(".")
    result = unicodedata.normalize("NFC", safe)
    if not result or len(text.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise UserError(
            f"cannot make a case id of {text[:80]!r} (a name of 1 to {_LONGEST_NAME} bytes); "
            "rename the file"
        )
    content = result.encode()
    if len(content) > _LONGEST:
        mark = f"-{hashlib.sha256(content).hexdigest()[:12]}"
        result = content[: _LONGEST - len(mark)].decode(errors="ignore") + mark
    return result


def _is_letter(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind == "Nd"


def inside(root: Path, text, where: str) -> Path:
    """`root / text` for a relative path without `..`; what a list names must not lead elsewhere."""
    parts = re.split(r"[/\\]", text) if isinstance(text, str) else [".."]
    long = isinstance(text, str) and (len(text) > 1000 or max(map(len, parts)) > _LONGEST_NAME)
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
                alike = [source for i, source in found if i == case_id]
                names = {source.name for source in alike}
                files = ", ".join(s.name if len(names) == number else str(s) for s in alike)
                listing.add(
                    "duplicate_id",
                    own.get(case_id, partners.get(case_id)),
                    f"there are several {kind} files for case {case_id} ({files}), keep one",
                )
    return listing
