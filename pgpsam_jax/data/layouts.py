"""Find the cases of a data set on disk and split them by patient."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pgpsam_jax.errors import UserError

# The split every paper of this family uses on BTCV/Synapse.
BTCV_TRAIN = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
BTCV_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)

_BTCV_FOLDERS = ("RawData/Training", "Training", ".", "Abdomen/RawData/Training")
_BTCV_HELP = (
    "expected RawData/Training/img/img0001.nii.gz and RawData/Training/label/label0001.nii.gz; "
    "RawData.zip is in Synapse project syn3193805 (www.synapse.org, registration needed)"
)


@dataclass(frozen=True)
class Case:
    """One patient's volume; `case_id` is safe in a file name."""

    case_id: str
    image: Path
    label: Path | None = None


def find_cases(layout: str, root, image_glob=None, label_glob=None) -> list[Case]:
    """Cases sorted by id.

    `btcv`: `root` holds, or is inside, `RawData/Training/{img,label}`. `pairs`: globs relative to
    `root`, one `*` each, standing for the case id; no `*` in either means one case, named after
    the image's folder; no `label_glob` means images without labels.
    """
    root = Path(root)
    if layout == "btcv":
        cases = _btcv(root)
    elif layout == "pairs":
        cases = _pairs(root, image_glob, label_glob)
    else:
        raise UserError(f"unknown data layout {layout!r}; known are btcv and pairs")
    ids = [case.case_id for case in cases]
    double = sorted({case_id for case_id in ids if ids.count(case_id) > 1})
    if double:
        raise UserError(f"{root} holds several files for case {', '.join(double)}; keep one each")
    return sorted(cases, key=lambda case: case.case_id)


def split_cases(
    cases: Sequence[Case], kind: str, *, file=None, test_fraction=None, seed: int = 0
) -> tuple[list[Case], list[Case]]:
    """Train and test cases, patients never in both, except that `within_volume` returns all twice.

    `btcv_18_12` is the published split, `file` a JSON object with "train" and "test" id lists,
    `fraction` a seeded draw of whole patients. With `within_volume`, scoring has to leave out
    the training slices.
    """
    cases = list(cases)
    if kind == "within_volume":
        return cases, cases
    if kind == "btcv_18_12":
        train, test = BTCV_TRAIN, BTCV_TEST
    elif kind == "file":
        train, test = _split_file(file)
    elif kind == "fraction":
        train, test = _split_fraction(cases, test_fraction, seed)
    else:
        raise UserError(
            f"unknown split {kind!r}; known are btcv_18_12, file, fraction and within_volume"
        )
    return _select(cases, train, test, f"split {file or kind}")


def safe_case_id(text: str) -> str:
    """A case id of [A-Za-z0-9_.-] that cannot leave its folder; other characters become `_`."""
    result = re.sub(r"[^A-Za-z0-9_.-]", "_", text).lstrip(".")
    if not result:
        raise UserError(f"cannot make a case id of {text!r}; rename the file")
    return result


def _btcv(root: Path) -> list[Case]:
    _check_root(root, _BTCV_HELP)
    base = next((root / f for f in _BTCV_FOLDERS if (root / f / "img").is_dir()), None)
    if base is None:
        raise UserError(f"no img folder of the BTCV layout under {root}: {_BTCV_HELP}")
    images = _numbered(base / "img", "img")
    labels = _numbered(base / "label", "label")
    return _match(images, labels, base, _BTCV_HELP)


def _numbered(folder: Path, prefix: str) -> list[tuple[str, Path]]:
    pattern = re.compile(prefix + r"(\d+)\.nii(\.gz)?")
    found = ((pattern.fullmatch(path.name), path) for path in sorted(folder.glob("*")))
    return [(match[1], path) for match, path in found if match]


def _pairs(root: Path, image_glob, label_glob) -> list[Case]:
    if not image_glob:
        raise UserError("layout pairs needs an image_glob such as images/*.nii.gz")
    _check_root(root, f"expected a folder that holds {image_glob}")
    images = _glob(root, image_glob)
    if label_glob is None:
        return _match(images, None, root, f"expected {image_glob}")
    if ("*" in image_glob) != ("*" in label_glob):
        raise UserError(f"{image_glob!r} and {label_glob!r} must both hold one * or both none")
    labels = _glob(root, label_glob)
    if "*" not in image_glob and images and labels:
        labels = [(images[0][0], labels[0][1])]
    return _match(images, labels, root, f"expected {image_glob} and {label_glob}")


def _glob(root: Path, pattern: str) -> list[tuple[str, Path]]:
    """(case id, path) of every match; hidden files, which tools leave behind, are no data."""
    parts = PurePosixPath(pattern).parts
    if pattern.startswith("/") or ".." in parts or re.search(r"[?\[\]]|\*.*\*", pattern):
        raise UserError(f"{pattern!r} must be relative to {root}, without .., with at most one *")
    if "*" not in pattern:
        path = root / pattern
        return [(safe_case_id(path.resolve().parent.name), path)] if path.is_file() else []
    head, tail = "/".join(parts).split("*")
    wanted = re.compile(re.escape(head) + r"([^/.][^/]*)" + re.escape(tail))
    found = (
        (wanted.fullmatch(path.relative_to(root).as_posix()), path)
        for path in root.glob(pattern)
        if path.is_file()
    )
    return [(safe_case_id(match[1]), path) for match, path in found if match]


def _match(images, labels, root: Path, expected: str) -> list[Case]:
    """Pair by case id, never by position; all missing partners in one message."""
    if not images:
        raise UserError(f"no images found in {root}: {expected}")
    if labels is None:
        return [Case(case_id, path) for case_id, path in images]
    ids, partners = {case_id for case_id, _ in images}, dict(labels)
    lone = [f"label of {i}" for i in sorted(ids - set(partners))]
    lone += [f"image of {i}" for i in sorted(set(partners) - ids)]
    if lone:
        raise UserError(f"missing in {root}: {', '.join(lone)}; {expected}")
    if len(partners) < len(labels):
        raise UserError(f"{root} holds several label files for one case; keep one each")
    return [Case(case_id, path, partners[case_id]) for case_id, path in images]


def _check_root(root: Path, expected: str) -> None:
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: {expected}")


def _split_file(file) -> tuple[list, list]:
    try:
        value = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"split file {file} cannot be read as JSON: {error}") from error
    lists = [value.get(key) for key in ("train", "test")] if isinstance(value, dict) else []
    if (
        not lists
        or set(value) != {"train", "test"}
        or not all(
            isinstance(ids, list) and ids and all(type(i) in (str, int) for i in ids)
            for ids in lists
        )
    ):
        raise UserError(f'split file {file} must be {{"train": [ids], "test": [ids]}}, not empty')
    return lists[0], lists[1]


def _split_fraction(cases: list[Case], fraction, seed: int) -> tuple[list[str], list[str]]:
    if fraction is None or not 0 < fraction < 1 or len(cases) < 2:
        raise UserError(
            f"split fraction needs 0 < test_fraction < 1 and at least 2 cases, got {fraction} and "
            f"{len(cases)} (within_volume is the split for a single case)"
        )
    count = min(max(round(fraction * len(cases)), 1), len(cases) - 1)
    ids = sorted(case.case_id for case in cases)
    test = set(random.Random(seed).sample(ids, count))
    return [i for i in ids if i not in test], [i for i in ids if i in test]


def _select(cases: list[Case], train, test, what: str) -> tuple[list[Case], list[Case]]:
    known = {_key(case.case_id): case for case in cases}
    if len(known) < len(cases):
        raise UserError(f"{what}: case ids differ only by leading zeros; rename the files")
    train, test = [_key(i) for i in train], [_key(i) for i in test]
    missing = sorted({i for i in train + test if i not in known})
    if missing:
        raise UserError(f"{what} names cases that are not in the data: {', '.join(missing)}")
    double = sorted({i for i in train + test if (train + test).count(i) > 1})
    if double:
        raise UserError(f"{what} names cases twice, which would leak: {', '.join(double)}")
    return [known[i] for i in train], [known[i] for i in test]


def _key(case_id) -> str:
    """`5`, `05` and `0005` are the same patient."""
    text = str(case_id)
    return str(int(text)) if text.isascii() and text.isdigit() else text
