"""Layout of TransUNet, SAMed and H-SAM: lists, slices in `.npz`, test volumes in HDF5.

`train_npz/case0005_slice042.npz` and `test_vol_h5/case0008.npy.h5` hold `image` and `label`.
`train.txt` lists slices, `test_vol.txt` volumes; the lists are in the data folder, in `lists` or in
the only folder inside `lists`. Without lists, all files are used. The slices of a case form one
volume, in order of their numbers: few-shot lists refer to positions in that volume.
"""

import re
from pathlib import Path

from pgpsam_jax.data.findings import WARNING
from pgpsam_jax.data.io.array_files import ArrayFiles
from pgpsam_jax.data.io.volume_files import entries
from pgpsam_jax.data.layouts.cases import Case, Listing, check_root, safe_case_id
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import read_text, sanitize

EXPECTED = (
    "expected the layout of TransUNet: train_npz/case0005_slice000.npz, "
    "test_vol_h5/case0008.npy.h5 and lists/lists_Synapse/{train,test_vol}.txt"
)
TRAIN, TEST = "train_npz", "test_vol_h5"
_SLICE = re.compile(r"(.+)_slice([0-9]{1,6})")
_SUFFIXES = (".npy.h5", ".h5")


def scan(root: Path) -> Listing:
    """Returns all cases; the slices of a training case form a volume."""
    check_root(root, EXPECTED)
    if not (root / TRAIN).is_dir() and not (root / TEST).is_dir():
        raise UserError(f"neither {TRAIN} nor {TEST} found in {root}: {EXPECTED}")
    lists, listing = _list_folder(root), Listing([], expected=EXPECTED)
    slices = _files(lists, "train.txt", root / TRAIN, (".npz",), listing)
    volumes = _files(lists, "test_vol.txt", root / TEST, _SUFFIXES, listing)
    _add_slices(listing, slices)
    for case_id, path in volumes.items():
        _add(listing, case_id, (path,), "test")
    if not listing.cases:
        raise UserError(f"no cases found in {root}: {EXPECTED}")
    ids = [case.case_id for case in listing.cases]
    for case in listing.cases:
        if case.part == "test" and ids.count(case.case_id) > 1:
            message = f"case {case.case_id} is in the training and the test list, which leaks"
            listing.add("both_splits", volumes[case.case_id], message)
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


def _files(lists: Path | None, file: str, folder: Path, suffixes, listing: Listing):
    """Returns safe name -> path of the files in a list, or of all files of the folder.

    Lists and folders may spell a name differently if `safe_case_id` maps both to the same id.
    """
    there: dict[str, Path] = {}
    for path in entries(folder) if folder.is_dir() else ():
        stem = _stem(path.name, suffixes)
        if stem in (path.name, "") or path.name[0] == ".":
            continue
        name = _safe(stem)
        if name in there:
            message = f"{there[name].name} and {path.name} are both {name}; rename or remove one"
            listing.add("duplicate_id", path, message)
        there.setdefault(name, path)
    chosen = there
    if lists is not None:
        named = _names(lists / file, suffixes, listing) if (lists / file).is_file() else {}
        chosen = {n: there.get(n, folder / (s + suffixes[0])) for n, s in named.items()}
    listing.note_skipped(folder, there.values())
    return chosen


def _names(path: Path, suffixes, listing: Listing) -> dict[str, str]:
    """Returns safe name -> name in a list; raises a `UserError` for anything but plain names."""
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(path, "list").splitlines(), 1):
        stem = _stem(line.strip(), suffixes)
        if not stem:
            continue
        if stem[0] == "." or re.search(r"[/\\\x00-\x1f\x7f]", stem) or len(stem.encode()) > 250:
            raise UserError(
                f"{path} line {number} is {line[:100]!r:.80}, not a plain file name; lists must "
                "not lead out of the data folder"
            )
        name = _safe(stem)
        if name in names:
            message = f"{path} names {sanitize(stem)} twice; keep one line"
            listing.add("duplicate_id", path, message)
        names.setdefault(name, stem)
    return names


def _safe(stem: str) -> str:
    """Replaces the name of the case by its id."""
    match = _SLICE.fullmatch(stem)
    return f"{safe_case_id(match[1])}_slice{match[2]}" if match else safe_case_id(stem)


def _stem(name: str, suffixes) -> str:
    suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _add_slices(listing: Listing, files: dict[str, Path]) -> None:
    """Groups slices to cases; warns about missing numbers, which may be intended."""
    cases: dict[str, dict[int, Path]] = {}
    for name, path in files.items():
        match = _SLICE.fullmatch(name)
        if match is None:
            message = f"{path} is not named CASE_sliceNUMBER.npz; rename it"
            listing.add("name", path, message)
            continue
        if int(match[2]) in cases.setdefault(match[1], {}):
            message = f"slice {int(match[2])} of {match[1]} appears twice; keep one"
            listing.add("duplicate_id", path, message)
        cases[match[1]][int(match[2])] = path
    for case_id, slices in cases.items():
        numbers = sorted(slices)
        lacking = numbers[-1] - numbers[0] + 1 - len(numbers)
        if lacking:
            message = (
                f"case {case_id} lacks {lacking} slices between {numbers[0]} and {numbers[-1]}; "
                "the others are treated as neighbors"
            )
            listing.add("slices", slices[numbers[0]], message, WARNING)
        _add(listing, case_id, tuple(slices[number] for number in numbers), "train")


def _add(listing: Listing, case_id: str, files: tuple[Path, ...], part: str) -> None:
    for path in files:
        if not path.is_file():
            listing.add("missing", path, f"{path} is in the list but not there; get the file")
    image, label = (ArrayFiles(files, key) for key in ("image", "label"))
    listing.cases.append(Case(case_id, image, label, part))
