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
# The release's: half of the test cases choose the checkpoint, the other half are scored.
BTCV_VALIDATION_6 = (2, 8, 22, 32, 36, 38)
BTCV_TEST_6 = (1, 3, 4, 25, 29, 35)

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
    cases: Sequence[Case],
    kind: str,
    *,
    file=None,
    test_fraction=None,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[list[Case], list[Case], list[Case]]:
    """Train, validation (may be empty) and test cases; no patient is in two of them.

    `btcv_18_12` is the published split, `btcv_18_6_6` the release's, `file` a JSON object with
    id lists "train", "test" and perhaps "validation", `fraction` a seeded draw of whole patients,
    whose test cases do not depend on `validation_fraction`. `within_volume` returns all cases as
    train and as test: scoring has to leave out the training slices.
    """
    cases = list(cases)
    if validation_fraction and kind != "fraction":
        raise UserError(
            f"data.validation_fraction is {validation_fraction}, which split {kind!r} does not "
            "use; set it to 0, or data.split to fraction"
        )
    if kind == "within_volume":
        return cases, [], cases
    if kind == "btcv_18_12":
        parts = BTCV_TRAIN, (), BTCV_TEST
    elif kind == "btcv_18_6_6":
        parts = BTCV_TRAIN, BTCV_VALIDATION_6, BTCV_TEST_6
    elif kind == "file":
        parts = _split_file(file)
    elif kind == "fraction":
        parts = _split_fraction(cases, validation_fraction, test_fraction, seed)
    else:
        raise UserError(
            f"unknown split {kind!r}; known are btcv_18_12, btcv_18_6_6, file, fraction and "
            "within_volume"
        )
    return _select(cases, parts, f"split {file or kind}")


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


def _split_file(file) -> tuple[list, list, list]:
    try:
        value = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"split file {file} cannot be read as JSON: {error}") from error
    keys = set(value) if isinstance(value, dict) else set()
    if (
        keys - {"validation"} != {"train", "test"}
        or not all(isinstance(ids, list) and ids for ids in value.values())
        or not all(type(i) in (str, int) for ids in value.values() for i in ids)
    ):
        raise UserError(
            f'split file {file} must be {{"train": [ids], "test": [ids]}}, with or without '
            '"validation": [ids], none of them empty'
        )
    return value["train"], value.get("validation", []), value["test"]


def _split_fraction(cases: list[Case], validation, test, seed: int) -> tuple[list[str], ...]:
    if test is None or not 0 < test < 1 or len(cases) < 2:
        raise UserError(
            f"split fraction needs 0 < test_fraction < 1 and at least 2 cases, got {test} and "
            f"{len(cases)} (within_volume is the split for a single case)"
        )
    count = min(max(round(test * len(cases)), 1), len(cases) - 1)
    held_out = max(round(validation * len(cases)), 1) if validation else 0
    if not 0 <= validation < 1 or count + held_out >= len(cases):
        raise UserError(
            f"data.validation_fraction {validation} must lie in [0, 1) and, beside test_fraction "
            f"{test}, leave one of the {len(cases)} cases to train on; lower one of them"
        )
    ids, draw = sorted(case.case_id for case in cases), random.Random(seed)
    tests = set(draw.sample(ids, count))
    rest = [i for i in ids if i not in tests]
    chosen = set(draw.sample(rest, held_out))
    return [i for i in rest if i not in chosen], sorted(chosen), sorted(tests)


def _select(cases: list[Case], parts, what: str) -> tuple[list[Case], ...]:
    known = {_key(case.case_id): case for case in cases}
    if len(known) < len(cases):
        raise UserError(f"{what}: case ids differ only by leading zeros; rename the files")
    parts = [[_key(i) for i in part] for part in parts]
    named = [i for part in parts for i in part]
    missing = sorted({i for i in named if i not in known})
    if missing:
        raise UserError(f"{what} names cases that are not in the data: {', '.join(missing)}")
    double = sorted({i for i in named if named.count(i) > 1})
    if double:
        raise UserError(f"{what} names cases twice, which would leak: {', '.join(double)}")
    return tuple([known[i] for i in part] for part in parts)


def _key(case_id) -> str:
    """`5`, `05` and `0005` are the same patient."""
    text = str(case_id)
    return str(int(text)) if text.isascii() and text.isdigit() else text
