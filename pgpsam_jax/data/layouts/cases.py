"""`Case`, `Listing`, safe case ids, and pairing of images with labels, for all layouts."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pgpsam_jax.data.findings import ERROR, WARNING, Finding
from pgpsam_jax.data.io.array_files import Source
from pgpsam_jax.data.io.volume_files import skipped_entries, undecodable
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import sanitize

_LONGEST_NAME = 255  # bytes that file systems allow
_LONGEST = 200  # bytes of a case id, which becomes part of file names


@dataclass(frozen=True)
class Case:
    """The volume of one patient."""

    case_id: str  # safe as a file name
    image: Source
    label: Source | None = None
    part: str = ""  # "train" or "test" if the layout splits the data
    group: str = ""  # cases of one group, such as one person, are never in two parts

    @property
    def truth(self) -> Source:
        """The label; raises a `UserError` if there is none."""
        if self.label is None:
            raise UserError(f"case {self.case_id} ({self.image}) has no label file")
        return self.label


@dataclass
class Listing:
    """All cases of a data set, sorted by id, and the problems with the names of their files."""

    cases: list[Case]
    findings: list[Finding] = field(default_factory=list)
    expected: str = ""  # description of the layout, for messages
    skipped: list[str] = field(default_factory=list)  # per folder, counts what is not data

    def note_skipped(self, folder: Path, used: Iterable[Source | None]) -> None:
        """Counts the entries of a folder that are not used."""
        if line := skipped_entries(folder, [path for path in used if isinstance(path, Path)]):
            self.skipped.append(line)

    def add(self, code: str, file, message: str, level: str = ERROR) -> None:
        self.findings.append(Finding(level, code, str(file), message))

    def check_names(self) -> None:
        """Warns about names that other programs or file systems confuse or cannot display."""
        by_case: dict[str, list[Case]] = {}
        for case in self.cases:
            by_case.setdefault(case.case_id.casefold(), []).append(case)
            for source in (case.image, case.label):
                if isinstance(source, Path) and undecodable(source):
                    message = f"the name is not UTF-8, its case is called {case.case_id}; rename it"
                    self.add("name", source, message, WARNING)
        for alike in by_case.values():
            ids = sorted({case.case_id for case in alike})
            if len(ids) > 1:
                message = (
                    f"cases {', '.join(ids)} differ only by upper and lower case: on a file system "
                    "that ignores case, one overwrites the other; rename one"
                )
                self.add("name", alike[0].image, message, WARNING)

    @property
    def errors(self) -> list[str]:
        """Messages of the findings that forbid using the data."""
        return [finding.message for finding in self.findings if finding.level == ERROR]


def safe_case_id(text: str) -> str:
    """Converts a patient's name to a case id, for file names and lists alike.

    Keeps letters, digits and combining marks of all scripts as well as `_`, `.` and `-`, composed
    (NFC); other characters become `_`. The end of long names is replaced by a hash.
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


def case_key(case_id: str | int) -> str:
    """Maps `5`, `05` and `0005` to one patient, and `pat 1` to the file `pat 1.nii.gz`."""
    try:
        text = safe_case_id(str(case_id))
    except UserError:  # no file has such a name
        text = str(case_id)
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else text


def listed(ids: Sequence[str]) -> str:
    """Returns the first twenty ids for a message."""
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    return ", ".join(sanitize(i) for i in ids[:20]) + more


def _is_letter(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind == "Nd"


def inside(root: Path, text, where: str) -> Path:
    """Returns `root / text`; raises a `UserError` if an untrusted path leads out of `root`."""
    parts = re.split(r"[/\\]", text) if isinstance(text, str) else [".."]
    long = isinstance(text, str) and (len(text) > 1000 or max(map(len, parts)) > _LONGEST_NAME)
    if long or not text or ".." in parts or not parts[0] or re.search(r"[:\x00-\x1f]", text):
        raise UserError(
            f"{where} names {sanitize(repr(text)[:200], 80)}, which is not a path inside the data "
            "set; give relative names without .."
        )
    return root.joinpath(*parts)


def check_root(root: Path, expected: str) -> None:
    """Raises a `UserError` if the data folder is missing."""
    if not root.is_dir():
        what = "is a file" if root.is_file() else "does not exist"
        raise UserError(f"data folder {root} {what}: {expected}")


def pair(images, labels, root: Path, expected: str, part: str = "") -> Listing:
    """Pairs images with labels by case id, never by position.

    Args:
        images, labels: (case id, source); labels None means images without labels.
        root: folder of the data set.
        expected: description of the layout, for messages.
        part: of all cases.
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
        for here, there, lacking in ((own, partners, "label"), (partners, own, "image")):
            for case_id in sorted(here.keys() - there.keys()):
                listing.add("missing_pair", here[case_id], f"{lacking} of {case_id} is missing")
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
