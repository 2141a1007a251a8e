"""Find the cases of a data set on disk and split them by patient."""

import os
import random
import re
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pgpsam_jax.data.io.array_files import NO_GRID
from pgpsam_jax.data.io.volume_files import entries, named_alike, stem_of, volumes_in
from pgpsam_jax.data.layouts import nnunet, transunet
from pgpsam_jax.data.layouts.cases import Case, Listing, check_root, pair, safe_case_id
from pgpsam_jax.data.layouts.label_table import SYNAPSE8, LabelTable
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import read_json, shown

LAYOUTS = ("btcv", "nnunet", "transunet", "pairs")

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


def find_cases(layout: str, root, image_glob=None, label_glob=None) -> list[Case]:
    """Cases sorted by id; a data set with any error in its files' names is refused.

    `btcv`: `root` holds, or is inside, `RawData/Training/{img,label}`. `nnunet` and `transunet`:
    see those modules. `pairs`: globs relative to `root`, one `*` each, standing for the case id;
    no `*` in either means one case, named after the image's folder; no `label_glob` means images
    without labels.
    """
    listing = scan(layout, root, image_glob, label_glob)
    if errors := listing.errors:
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise UserError(f"in {root} {', '.join(errors[:5])}{more}; {listing.expected}")
    if layout == "transunet":
        warnings.warn(NO_GRID, stacklevel=2)
    for line in listing.passed_over:
        warnings.warn(line, stacklevel=2)
    cases = [case for case in listing.cases if case.label is not None] or listing.cases
    if aside := len(listing.cases) - len(cases):
        warnings.warn(f"{aside} image(s) of {root} without a label are left aside", stacklevel=2)
    return sorted(cases, key=lambda case: case.case_id)


def expected(layout: str, image_glob=None, label_glob=None) -> str:
    """Returns what the folder of a layout holds, for messages."""
    if layout == "pairs":
        return f"expected a folder with {image_glob} and {label_glob}"
    known = {"nnunet": nnunet.EXPECTED, "transunet": transunet.EXPECTED, "btcv": _BTCV_HELP}
    return known.get(layout, "expected a folder to write the data set to")


def scan(layout: str, root, image_glob=None, label_glob=None) -> Listing:
    """All cases, with what is wrong with the names of their files (see `find_cases`)."""
    root = Path(root)
    if layout == "btcv":
        listing = _btcv(root)
    elif layout == "nnunet":
        listing = nnunet.scan(root)
    elif layout == "transunet":
        listing = transunet.scan(root)
    elif layout == "pairs":
        listing = _pairs(root, image_glob, label_glob)
    else:
        raise UserError(f"unknown data layout {layout!r}; known are {', '.join(LAYOUTS)}")
    listing.check_names()
    return listing


def detect(root, image_glob=None) -> str:
    """The layout of a folder, by what lies in it; with an `image_glob` it is `pairs`."""
    root = Path(root)
    check_root(root, "give the folder of a data set")
    if image_glob:
        return "pairs"
    if (root / "dataset.json").is_file():
        return "nnunet"
    if (root / transunet.TRAIN).is_dir() or (root / transunet.TEST).is_dir():
        return "transunet"
    if _btcv_base(root) is not None:
        return "btcv"
    raise UserError(
        f"{root} is of no known layout: {_BTCV_HELP}; or {nnunet.EXPECTED}; or "
        f"{transunet.EXPECTED}; or give layout pairs with image_glob and label_glob"
    )


def label_table(layout: str, root) -> LabelTable | None:
    """The label table that a layout brings, else None: there has to be a file."""
    if layout == "nnunet":
        return nnunet.label_table(root)
    return SYNAPSE8 if layout in ("btcv", "phantom") else None


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
    id lists "train", "test" and perhaps "validation", `given` what the layout itself says (the
    lists of TransUNet, imagesTr and imagesTs of nnU-Net), `fraction` a seeded draw of whole
    patients, whose test cases do not depend on `validation_fraction`. `within_volume` returns all
    cases as train and as test: scoring has to leave out the training slices. The last two leave
    the layout's own test cases out.
    """
    cases = list(cases)
    if validation_fraction and kind != "fraction":
        raise UserError(
            f"data.validation_fraction is {validation_fraction}, which split {kind!r} does not "
            "use; set it to 0, or data.split to fraction"
        )
    own = [case for case in cases if case.part != "test"] or cases
    if kind == "within_volume":
        return own, [], own
    if kind == "given":
        return _given(cases)
    if kind == "btcv_18_12":
        parts = BTCV_TRAIN, (), BTCV_TEST
    elif kind == "btcv_18_6_6":
        parts = BTCV_TRAIN, BTCV_VALIDATION_6, BTCV_TEST_6
    elif kind == "file":
        parts = _split_file(file)
    elif kind == "fraction":
        parts = _split_fraction(own, validation_fraction, test_fraction, seed)
    else:
        raise UserError(
            f"unknown split {kind!r}; known are btcv_18_12, btcv_18_6_6, file, given, fraction and "
            "within_volume"
        )
    return _select(cases, parts, f"split {file or kind}")


def _btcv_base(root: Path) -> Path | None:
    return next((root / f for f in _BTCV_FOLDERS if (root / f / "img").is_dir()), None)


def _btcv(root: Path) -> Listing:
    check_root(root, _BTCV_HELP)
    base = _btcv_base(root)
    if base is None:
        raise UserError(f"no img folder of the BTCV layout under {root}: {_BTCV_HELP}")
    images, labels = _numbered(base, "img"), _numbered(base, "label")
    listing = pair(images, labels, base, _BTCV_HELP)
    for kind, found in (("img", images), ("label", labels)):
        listing.pass_over(base / kind, [path for _, path in found])
    return listing


def _numbered(base: Path, kind: str) -> list[tuple[str, Path]]:
    """(number, path) of the volumes of a folder that are named by it and a number."""
    found = ((re.fullmatch(kind + "([0-9]+)", stem_of(p)), p) for p in volumes_in(base / kind))
    return [(match[1], path) for match, path in found if match]


def _pairs(root: Path, image_glob, label_glob) -> Listing:
    if not image_glob:
        raise UserError("layout pairs needs an image_glob such as images/*.nii.gz")
    check_root(root, f"expected a folder that holds {image_glob}")
    images, folders = _glob(root, image_glob)
    if label_glob is None:
        listing = pair(images, None, root, f"expected {image_glob}")
        labels = []
    else:
        if ("*" in image_glob) != ("*" in label_glob):
            raise UserError(f"{image_glob!r} and {label_glob!r} must both hold one * or both none")
        labels, more = _glob(root, label_glob)
        if "*" not in image_glob and images and labels:
            labels = [(images[0][0], labels[0][1])]
        listing = pair(images, labels, root, f"expected {image_glob} and {label_glob}")
        folders |= more
    for folder in sorted(folders):
        listing.pass_over(folder, [path for _, path in images + labels])
    return listing


def _glob(root: Path, pattern: str) -> tuple[list[tuple[str, Path]], set[Path]]:
    """(case id, path) of every match, and the folder of the `*` where it stands for files.

    Hidden entries, which tools leave behind, are no data. Of suffixes the case does not count.
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


def _given(cases: list[Case]) -> tuple[list[Case], list[Case], list[Case]]:
    parts = [[case for case in cases if case.part == part] for part in ("train", "test")]
    if not all(parts):
        raise UserError(
            f"split given needs a layout with training and test cases of its own, here are "
            f"{len(parts[0])} and {len(parts[1])}; choose another data.split"
        )
    return parts[0], [], parts[1]


def _split_file(file) -> tuple[list, list, list]:
    value = read_json(file or "", "split file")
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
        raise UserError(f"{what} names cases that are not in the data: {_listed(missing)}")
    double = sorted({i for i in named if named.count(i) > 1})
    if double:
        raise UserError(f"{what} names cases twice, which would leak: {_listed(double)}")
    return tuple([known[i] for i in part] for part in parts)


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    return ", ".join(shown(i) for i in ids[:20]) + more


def _key(case_id) -> str:
    """`5`, `05` and `0005` are the same patient, `pat 1` is the one of the file `pat 1.nii.gz`."""
    try:
        text = safe_case_id(str(case_id))
    except UserError:  # no file has such a name
        text = str(case_id)
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else text
