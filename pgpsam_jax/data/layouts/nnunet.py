"""Layout nnU-Net raw: dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz.

Only one channel is supported. Class names come from dataset.json. Cases of imagesTs with a label in
labelsTs are the part "test"; those without are only verified. The Medical Segmentation Decathlon
uses the same layout without `_0000`: images are named like their labels and listed in dataset.json.
"""

import re
from pathlib import Path

from pgpsam_jax.data.findings import WARNING
from pgpsam_jax.data.io.volume_files import named_alike, stem_of, volumes_in
from pgpsam_jax.data.layouts.cases import Listing, check_root, inside, pair, safe_case_id
from pgpsam_jax.data.layouts.label_table import LabelTable, as_id
from pgpsam_jax.errors import UserError
from pgpsam_jax.utils.untrusted_text import read_user_json

EXPECTED = (
    "expected the raw layout of nnU-Net: dataset.json, imagesTr/CASE_0000.nii.gz and "
    "labelsTr/CASE.nii.gz, or that of the Decathlon, which has no _0000"
)
_CHANNEL = "_0000"
_Sources = list[tuple[str, Path]]  # (case id, file)


def label_table(root) -> LabelTable:
    """Returns the class names and ids of dataset.json."""
    file, labels = Path(root) / "dataset.json", _description(Path(root))["labels"]
    ids: dict[str, int] = {}
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
                f"{file}: label {name!r:.60} or its id {value!r:.60} appears twice; keep one"
            )
        ids[name] = value
    if ids.pop("background", None) != 0:
        raise UserError(f'{file}: labels must hold "background": 0')
    names = sorted(ids, key=ids.__getitem__)
    try:
        return LabelTable(("background", *names), {ids[n]: k for k, n in enumerate(names, 1)})
    except UserError as error:
        raise UserError(f"{file}: labels: {error}") from error


def scan(root: Path) -> Listing:
    """Returns all cases of the data set."""
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
    listed = _decathlon(root, value)
    if "dataset" in value:
        listing = _named_cases(root, value["dataset"])
    elif listed:
        listing = pair(*listed, root, EXPECTED, "train")
    else:
        listing = _of_folders(root, "Tr")
    wanted = value.get("numTraining", len(listing.cases))
    if wanted != len(listing.cases):
        message = f"dataset.json declares {wanted!r:.20} training cases, {len(listing.cases)} found"
        listing.add("count", root / "dataset.json", message, WARNING)
    if volumes_in(root / "imagesTs"):
        tests = _of_folders(root, "Ts", plain=bool(listed))
        known = {case.case_id for case in listing.cases}
        for case in tests.cases:
            if case.case_id in known:
                message = f"case {case.case_id} is in imagesTr and in imagesTs, which leaks"
                listing.add("both_splits", case.image, message)
        listing.cases += tests.cases
        listing.findings += tests.findings
    used = [source for case in listing.cases for source in (case.image, case.label)]
    used += [Path(finding.file) for finding in listing.findings]
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        listing.note_skipped(root / name, used)
    return listing


def _description(root: Path) -> dict:
    file = root / "dataset.json"
    if not file.is_file():
        raise UserError(f"{file} not found: {EXPECTED}")
    value = read_user_json(file, "description")
    if not isinstance(value, dict) or not isinstance(value.get("labels"), dict):
        raise UserError(f'{file} must be an object with "labels": {{"background": 0, ...}}')
    return value


def _of_folders(root: Path, part: str, plain: bool = False) -> Listing:
    """Returns the cases of imagesTr and labelsTr, or of imagesTs and labelsTs.

    plain: images are named without `_0000`. This is also detected: no image has it, or all have a
    label of the same name.
    """
    found = volumes_in(root / f"images{part}")
    labels: _Sources | None
    labels = [(safe_case_id(stem_of(path)), path) for path in volumes_in(root / f"labels{part}")]
    stems = {stem_of(path) for path in found}
    of_labels = {stem_of(path) for _, path in labels}
    plain = plain or not any(map(_has_channel, stems)) or stems <= of_labels
    images = [
        (safe_case_id(stem_of(path).removesuffix("" if plain else _CHANNEL)), path)
        for path in found
        if plain or _has_channel(stem_of(path))
    ]
    if part == "Ts":  # labels are optional
        own = dict(images)
        labels = [(case_id, path) for case_id, path in labels if case_id in own] or None
    listing = pair(images, labels, root, EXPECTED, "train" if part == "Tr" else "test")
    for path in found:
        if not plain and not _has_channel(stem_of(path)):
            message = (
                f"{path} does not end in _0000 before its suffix, as others do; rename the "
                "first channel and remove the others"
            )
            listing.add("name", path, message)
    return listing


def _has_channel(stem: str) -> bool:
    return stem.endswith(_CHANNEL) and stem != _CHANNEL


def _decathlon(root: Path, value: dict) -> tuple[_Sources, _Sources] | None:
    """Returns the images and labels listed in a dataset.json of the Decathlon, else None.

    That of nnU-Net's first version has the list too, but its images have other names.
    """
    entries, file, kinds = value.get("training"), root / "dataset.json", ("image", "label")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and entry.keys() >= set(kinds) for entry in entries
    ):
        return None
    images, labels = [], []
    for entry in entries:
        image, label = (named_alike(inside(root, entry[kind], str(file))) for kind in kinds)
        images.append((safe_case_id(stem_of(image)), image))
        labels.append((images[-1][0], label))
    there = {path.name for folder in {p.parent for _, p in images} for path in volumes_in(folder)}
    return (images, labels) if any(path.name in there for _, path in images) else None


def _named_cases(root: Path, entries) -> Listing:
    """Returns the cases listed in a dataset.json of nnU-Net's second version."""
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
