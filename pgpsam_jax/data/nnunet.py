"""The raw layout of nnU-Net: dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz.

One channel. The class names come from dataset.json. Cases of imagesTs with a label in labelsTs
are the part "test"; without one they only count when files are checked.
"""

import re
from pathlib import Path

from pgpsam_jax.data.cases import Listing, check_root, inside, pair, safe_case_id
from pgpsam_jax.data.findings import WARNING
from pgpsam_jax.data.labels import LabelTable, as_id
from pgpsam_jax.errors import UserError
from pgpsam_jax.text_files import read_json

EXPECTED = (
    "expected the raw layout of nnU-Net: dataset.json, imagesTr/CASE_0000.nii.gz and "
    "labelsTr/CASE.nii.gz"
)


def label_table(root) -> LabelTable:
    """The class names and ids of dataset.json."""
    file, labels = Path(root) / "dataset.json", _description(Path(root))["labels"]
    ids = {}
    for name, value in labels.items():
        if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", name):  # version 1
            name, value = value, int(name)
        value = label if (label := as_id(value)) is not None else value
        if type(value) is not int:
            raise UserError(
                f"{file}: label {name!r:.60} is {value!r:.60}, not one id; regions are not "
                "supported, give every class an id of its own"
            )
        if name == "ignore":
            raise UserError(f"{file}: an ignore label is not supported; label those voxels")
        if name in ids or value in ids.values():
            raise UserError(
                f"{file}: label {name!r:.60} or its id {value!r:.60} is there twice; keep one"
            )
        ids[name] = value
    if ids.pop("background", None) != 0:
        raise UserError(f'{file}: labels must hold "background": 0')
    names = sorted(ids, key=ids.get)
    try:
        return LabelTable(("background", *names), {ids[n]: k for k, n in enumerate(names, 1)})
    except UserError as error:
        raise UserError(f"{file}: labels: {error}") from error


def scan(root: Path) -> Listing:
    """All cases of the data set."""
    check_root(root, EXPECTED)
    value = _description(root)
    channels = value.get("channel_names", value.get("modality"))
    if not isinstance(channels, dict) or len(channels) != 1:
        raise UserError(
            f"{root / 'dataset.json'} must name exactly one channel, got {channels!r:.80}; only "
            "images of one channel are supported, make a data set of one of them"
        )
    ending = value.get("file_ending", ".nii.gz")
    if ending not in (".nii.gz", ".nii"):
        raise UserError(
            f"{root / 'dataset.json'} has file_ending {ending!r:.40}; convert the files to .nii.gz"
        )
    if "dataset" in value:
        listing = _listed(root, value["dataset"])
    else:
        images, strays = _images(root / "imagesTr", ending)
        listing = pair(images, _labels(root / "labelsTr", ending), root, EXPECTED, "train")
        _refuse(listing, strays)
    wanted = value.get("numTraining", len(listing.cases))
    if wanted != len(listing.cases):
        message = (
            f"dataset.json speaks of {wanted!r:.20} training cases, {len(listing.cases)} found"
        )
        listing.add("count", root / "dataset.json", message, WARNING)
    images, strays = _images(root / "imagesTs", ending)
    if images:
        labels = dict(_labels(root / "labelsTs", ending))
        both = [(i, labels[i]) for i, _ in images if i in labels] if labels else None
        tests = pair(images, both, root, EXPECTED, "test")
        _refuse(tests, strays)
        known = {case.case_id for case in listing.cases}
        for case in tests.cases:
            if case.case_id in known:
                message = f"case {case.case_id} is in imagesTr and in imagesTs, which leaks"
                listing.add("both_splits", case.image, message)
        listing.cases += tests.cases
        listing.findings += tests.findings
    return listing


def _description(root: Path) -> dict:
    file = root / "dataset.json"
    if not file.is_file():
        raise UserError(f"{file} not found: {EXPECTED}")
    value = read_json(file, "description")
    if not isinstance(value, dict) or not isinstance(value.get("labels"), dict):
        raise UserError(f'{file} must be an object with "labels": {{"background": 0, ...}}')
    return value


def _images(folder: Path, ending: str):
    """(case id, file) of channel 0, and the files that are named in another way."""
    images, strays = [], []
    for path in _of_ending(folder, ending):
        stem = path.name.removesuffix(ending)
        if stem.endswith("_0000") and stem != "_0000":
            images.append((safe_case_id(stem.removesuffix("_0000")), path))
        else:
            strays.append(path)
    return images, strays


def _labels(folder: Path, ending: str):
    return [(safe_case_id(p.name.removesuffix(ending)), p) for p in _of_ending(folder, ending)]


def _of_ending(folder: Path, ending: str) -> list[Path]:
    """Files by their name; hidden ones, which tools leave behind, are no data."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path.name.endswith(ending) and path.name[0] != "."]


def _refuse(listing: Listing, strays: list[Path]) -> None:
    for path in strays:
        message = (
            f"{path} does not end in _0000 before its suffix; name the one channel so, and remove "
            "further ones (nnUNetv2_convert_MSD_dataset converts Decathlon names)"
        )
        listing.add("name", path, message)


def _listed(root: Path, entries) -> Listing:
    """The cases that dataset.json itself lists, with paths relative to it."""
    file, images, labels = root / "dataset.json", [], []
    if not isinstance(entries, dict):
        raise UserError(f'{file}: "dataset" must be an object of cases')
    for case_id, entry in entries.items():
        paths = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(paths, list) or len(paths) != 1 or "label" not in entry:
            raise UserError(
                f'{file}: case {case_id!r:.60} needs "images" with one path, and "label"'
            )
        images.append((safe_case_id(case_id), inside(root, paths[0], str(file))))
        labels.append((safe_case_id(case_id), inside(root, entry["label"], str(file))))
    return pair(images, labels, root, EXPECTED, "train")
