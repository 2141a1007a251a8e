"""The layout of TransUNet, SAMed and H-SAM: lists, slices in `.npz`, test volumes in HDF5.

`train_npz/case0005_slice042.npz` and `test_vol_h5/case0008.npy.h5` hold `image` and `label`.
`train.txt` names slices, `test_vol.txt` volumes; the lists lie in the data folder, in `lists` or
in the one folder inside `lists`. Without lists, all files count. The slices of a case become one
volume, in order of their numbers: a slice of the few-shot list is a position in that volume.
"""

import re
from pathlib import Path

from pgpsam_jax.data.arrays import ArrayFiles
from pgpsam_jax.data.cases import Case, Listing, check_root
from pgpsam_jax.data.findings import WARNING
from pgpsam_jax.errors import UserError
from pgpsam_jax.text_files import read_text

EXPECTED = (
    "expected the layout of TransUNet: train_npz/case0005_slice000.npz, "
    "test_vol_h5/case0008.npy.h5 and lists/lists_Synapse/{train,test_vol}.txt"
)
TRAIN, TEST = "train_npz", "test_vol_h5"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,149}")
_SLICE = re.compile(r"(.+)_slice(\d{1,6})")
_SUFFIXES = (".npy.h5", ".h5")


def scan(root: Path) -> Listing:
    """All cases, training volumes first made of their slices."""
    check_root(root, EXPECTED)
    if not (root / TRAIN).is_dir() and not (root / TEST).is_dir():
        raise UserError(f"neither {TRAIN} nor {TEST} found in {root}: {EXPECTED}")
    lists, listing = _list_folder(root), Listing([], expected=EXPECTED)
    slices = _names(lists, "train.txt", root / TRAIN, (".npz",), listing)
    volumes = _names(lists, "test_vol.txt", root / TEST, _SUFFIXES, listing)
    _add_slices(listing, root / TRAIN, slices)
    for name in volumes:
        paths = [root / TEST / (name + suffix) for suffix in _SUFFIXES]
        path = next((path for path in paths if path.is_file()), paths[0])
        _add(listing, name, (path,), "test")
    if not listing.cases:
        raise UserError(f"no cases found in {root}: {EXPECTED}")
    ids = [case.case_id for case in listing.cases]
    for case in listing.cases:
        if case.part == "test" and ids.count(case.case_id) > 1:
            message = f"case {case.case_id} is in the training and the test list, which leaks"
            listing.add("both_splits", case.image.files[0], message)
    listing.cases.sort(key=lambda case: case.case_id)
    return listing


def _list_folder(root: Path) -> Path | None:
    known = ("train.txt", "test_vol.txt")
    folders = [root, root / "lists"]
    folders += sorted(path for path in (root / "lists").glob("*") if path.is_dir())
    found = [f for f in folders if any((f / name).is_file() for name in known)]
    if len(found) > 1:
        raise UserError(
            f"{root} holds lists in {', '.join(f.name for f in found)}; keep one of these folders"
        )
    return found[0] if found else None


def _names(lists: Path | None, file: str, folder: Path, suffixes, listing: Listing) -> list[str]:
    """Names in a list, or of all files of the folder; what is no plain name is refused."""
    if lists is None or not (lists / file).is_file():
        if lists is not None:
            return []
        found = [path.name for path in sorted(folder.glob("*")) if path.name[0] != "."]
        named = [_stem(name, suffixes) for name in found if name.endswith(suffixes)]
        return [name for name in named if _NAME.fullmatch(name)]
    path, names = lists / file, {}  # a dictionary for its quick look-up
    for number, line in enumerate(read_text(path, "list").splitlines(), 1):
        name = _stem(line.strip(), suffixes)
        if not name:
            continue
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path} line {number} is {line[:100]!r:.80}, no plain file name; lists must not "
                "lead out of the data folder"
            )
        if name in names:
            listing.add("duplicate_id", path, f"{path} names {name} twice; keep one line")
        else:
            names[name] = None
    return list(names)


def _stem(name: str, suffixes) -> str:
    suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), "")
    return name.removesuffix(suffix)


def _add_slices(listing: Listing, folder: Path, names: list[str]) -> None:
    """Group slices to cases; a number that lacks is a warning: it may be left out on purpose."""
    cases: dict[str, dict[int, Path]] = {}
    for name in names:
        match = _SLICE.fullmatch(name)
        path = folder / f"{name}.npz"
        if match is None:
            message = f"{path} is not named CASE_sliceNUMBER.npz; rename it"
            listing.add("name", path, message)
            continue
        if int(match[2]) in cases.setdefault(match[1], {}):
            message = f"slice {int(match[2])} of {match[1]} is there twice; keep one"
            listing.add("duplicate_id", path, message)
        cases[match[1]][int(match[2])] = path
    for case_id, slices in cases.items():
        numbers = sorted(slices)
        lacking = numbers[-1] - numbers[0] + 1 - len(numbers)
        if lacking:
            message = (
                f"case {case_id} lacks {lacking} slices between {numbers[0]} and {numbers[-1]}; "
                "the others count as neighbours"
            )
            listing.add("slices", slices[numbers[0]], message, WARNING)
        _add(listing, case_id, tuple(slices[number] for number in numbers), "train")


def _add(listing: Listing, case_id: str, files: tuple[Path, ...], part: str) -> None:
    for path in files:
        if not path.is_file():
            listing.add("missing", path, f"{path} is in the list but not there; get the file")
    image, label = (ArrayFiles(files, key) for key in ("image", "label"))
    listing.cases.append(Case(case_id, image, label, part))
