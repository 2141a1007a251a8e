"""Data of a configuration: cases, splits, label table, few-shot and validation slices."""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from pgpsam_jax.data import cache, fewshot_list
from pgpsam_jax.data.io import array_checks, volumes
from pgpsam_jax.data.io.voxel_grid import AXES, AXIAL
from pgpsam_jax.data.layouts import find, groups
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable, load_label_table
from pgpsam_jax.data.layouts.split import split_cases
from pgpsam_jax.errors import UserError


class Split(NamedTuple):
    """Cases of each part (see `layouts.split`) and their label table."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]
    table: LabelTable


@dataclasses.dataclass(frozen=True, eq=False)
class Slices:
    """Preprocessed slices in memory.

    Attributes:
        images: (N, S, S) float16.
        labels: (N, S, S) uint8.
        digest: hash of the volumes, their labels and the preprocessing.
    """

    images: np.ndarray
    labels: np.ndarray
    digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class FewShotData(Slices):
    """The training set: the slices of the few-shot list, and one line about it."""

    list: fewshot_list.FewShotList
    summary: str


@dataclasses.dataclass(frozen=True, eq=False)
class ValidationData(Slices):
    """The valid slices of the validation cases, and the number of classes and of cases."""

    num_classes: int
    cases: int


def label_table(data: ConfigDict) -> LabelTable:
    """Returns the label table of `config.data`; some layouts have one built in."""
    if data.label_table:
        return load_label_table(data.label_table)
    table = find.label_table(data.layout, data.root)
    if table is not None:
        return table
    raise UserError(
        f"data.layout {data.layout!r} needs data.label_table, a JSON file that names the "
        'classes: {"classes": [{"name": "spleen", "source": [1]}, ...]}'
    )


def find_cases(data: ConfigDict) -> list[Case]:
    """Returns the cases of `config.data`; generates the phantom if it is missing."""
    array_checks.allow(data.max_gib)
    layout = data.layout
    if not (data.root and (layout == "phantom" or Path(data.root).is_dir())):
        wrong = f"{str(data.root)!r} is not a folder" if data.root else "is empty"
        expected = find.expected(layout, data.image_glob, data.label_glob)
        raise UserError(f"data.root {wrong}; give --config.data.root=FOLDER: {expected}")
    if layout == "phantom":
        from pgpsam_jax.data.phantom import generate

        generate.generate(data.root, seed=data.phantom_seed)
        layout = "btcv"
    return find.find_cases(layout, data.root, data.image_glob or None, data.label_glob or None)


def find_split(data: ConfigDict) -> Split:
    """Returns the cases of `config.data` by part."""
    table = label_table(data)
    cases = groups.with_groups(find_cases(data), data.group, data.group_file)
    parts = split_cases(
        cases,
        data.split,
        file=data.split_file or None,
        test_fraction=data.test_fraction,
        validation_fraction=data.validation_fraction,
        seed=data.split_seed,
        folds=data.folds,
        fold=data.fold,
    )
    return Split(*parts, table)


def axis_of(data: ConfigDict, cases) -> str:
    """Returns `data.axis`; for "auto" the acquisition axis of most cases.

    Cases with nearly isotropic voxels do not count; if all are, slices are axial.
    """
    if data.axis not in ("auto", *AXES):
        raise UserError(f"data.axis is {data.axis!r}; give auto, {', '.join(AXES)}")
    if data.axis != "auto":
        return data.axis
    axes: Counter[str] = Counter()
    for case in cases if data.layout != "transunet" else ():
        with contextlib.suppress(UserError):  # `verification` reports what cannot be read
            if axis := volumes.read_grid(case.image).thick_axis:
                axes[axis] += 1
    return axes.most_common(1)[0][0] if axes else AXIAL


def few_shot_data(
    cached: Sequence[cache.CachedCase],
    fewshot: ConfigDict,
    names: Sequence[str],
    workdir=None,
    groups: Mapping[str, str] | None = None,
) -> FewShotData:
    """Returns the slices of the few-shot list.

    Args:
        cached: the training cases.
        fewshot: `config.fewshot`, the sampling rule or file of the list.
        names: of the K classes, for the summary.
        workdir: of a run to resume, whose list is used.
        groups: of `fewshot_list.make_list`.
    """
    areas = {case.case_id: case.areas for case in cached}
    settings = dict(fewshot)
    file, rule = settings.pop("file"), settings.pop("rule")
    if workdir is not None:
        chosen = stored_list(workdir, areas)
    elif file:
        chosen = fewshot_list.read_list(file, areas)
    else:
        chosen = fewshot_list.make_list(areas, rule, **settings, groups=groups)
    images, labels = cache.gather_slices(cached, chosen.entries)
    return FewShotData(images, labels, _digest(cached), chosen, chosen.summary(areas, names))


def validation_data(
    cached: Sequence[cache.CachedCase], num_classes: int, min_pixels: int
) -> ValidationData:
    """Returns the valid slices of the validation cases.

    Args:
        cached: the validation cases.
        num_classes: K, background included.
        min_pixels: of some organ, for a slice to be valid.
    """
    entries = [
        (case.case_id, int(index))
        for case in cached
        for index in np.flatnonzero(fewshot_list.in_pool(case.areas, "valid", min_pixels))
    ]
    found = cache.gather_slices(cached, entries) if entries else None
    if found is None or not found[1].any():
        raise UserError(
            f"no validation slice has an organ of {min_pixels} pixels or more; lower "
            "fewshot.min_pixels or choose other validation cases"
        )
    return ValidationData(*found, _digest(cached), num_classes, len(cached))


def _digest(cached: Sequence[cache.CachedCase]) -> str:
    return _combined((case.case_id, case.meta["key"]) for case in cached)


def images_digest(cases) -> str:
    """Returns the SHA-256 of the image files of cases, with their ids."""
    return _combined((case.case_id, volumes.digest(case.image)) for case in cases)


def _combined(digests) -> str:
    text = "".join(f"{case_id} {digest}\n" for case_id, digest in digests)
    return hashlib.sha256(text.encode()).hexdigest()


def stored_list(workdir, areas=None) -> fewshot_list.FewShotList:
    """Returns the few-shot list of a workdir."""
    return fewshot_list.read_list(Path(workdir) / "fewshot.txt", areas)


def unseen_slices(fewshot: ConfigDict, table: LabelTable, entries):
    """Returns (case id, truth (D, H, W)) -> boolean (D,): pool slices not trained on."""
    trained: dict[str, list[int]] = {}
    for case_id, index in entries:
        trained.setdefault(case_id, []).append(index)

    def region(case_id: str, truth: np.ndarray) -> np.ndarray:
        areas = cache.slice_areas(truth, table.num_classes)
        mask = fewshot_list.in_pool(areas, fewshot.pool, fewshot.min_pixels)
        mask[trained.get(case_id, [])] = False
        return mask

    return region
