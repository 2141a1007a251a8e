"""Data of a configuration: cases, splits, label table, few-shot and validation slices."""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from pgpsam_jax.data import cache, fewshot_list
from pgpsam_jax.data.io import array_checks, volumes
from pgpsam_jax.data.io.voxel_grid import AXES, AXIAL
from pgpsam_jax.data.layouts import find
from pgpsam_jax.data.layouts.cases import Case
from pgpsam_jax.data.layouts.label_table import LabelTable, load_label_table
from pgpsam_jax.data.layouts.split import split_cases
from pgpsam_jax.data.letterbox import Percentiles, Window
from pgpsam_jax.data.quality import appearance
from pgpsam_jax.errors import UserError


class Split(NamedTuple):
    """Cases of each part (see `layouts.split`) and their label table."""

    train: list[Case]
    validation: list[Case]
    test: list[Case]
    table: LabelTable


@dataclasses.dataclass(frozen=True, eq=False)
class FewShotData:
    """The training set in memory.

    Attributes:
        images: (N, S, S) float16.
        labels: (N, S, S) uint8.
        digest: hash of the training volumes, their labels and the preprocessing.
        looks: intensity and size statistics of the volumes (`quality.appearance`).
    """

    images: np.ndarray
    labels: np.ndarray
    list: fewshot_list.FewShotList
    summary: str
    digest: str
    looks: dict


@dataclasses.dataclass(frozen=True, eq=False)
class ValidationData:
    """Valid slices of the validation cases.

    Attributes:
        images: (N, S, S) float16.
        labels: (N, S, S) uint8.
        num_classes: K, background included.
        cases: number of cases.
        digest: as in `FewShotData`.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    cases: int
    digest: str


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
    parts = split_cases(
        find_cases(data),
        data.split,
        file=data.split_file or None,
        test_fraction=data.test_fraction,
        validation_fraction=data.validation_fraction,
        seed=data.split_seed,
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
    axes = Counter()
    for case in cases if data.layout != "transunet" else ():
        with contextlib.suppress(UserError):  # `verification` reports what cannot be read
            axes[volumes.read_grid(case.image).thick_axis] += 1
    del axes[None]
    return axes.most_common(1)[0][0] if axes else AXIAL


def window_of(data: ConfigDict) -> Window:
    """Returns the intensities that `config.data` maps to [0, 1]."""
    low, high = map(float, data.window)
    if data.window_unit not in ("intensity", "percent"):
        raise UserError(f"data.window_unit is {data.window_unit!r}; give intensity, percent")
    if data.window_unit == "intensity":
        return low, high
    if not 0 <= low < high <= 100:
        raise UserError(f"data.window {(low, high)} is in percent; give 0 <= low < high <= 100")
    return Percentiles(low, high)


def few_shot_data(
    data: ConfigDict,
    fewshot: ConfigDict,
    image_size: int,
    cases,
    table: LabelTable,
    workdir,
    *,
    resume: bool,
) -> FewShotData:
    """Returns the slices of the few-shot list, or of the list in the workdir when resuming."""
    cached = read_cases(data, image_size, cases, table, workdir)
    areas = {case.case_id: case.areas for case in cached}
    settings = dict(fewshot)
    file, rule = settings.pop("file"), settings.pop("rule")
    if resume:
        chosen = stored_list(workdir, areas)
    elif file:
        chosen = fewshot_list.read_list(file, areas)
    else:
        chosen = fewshot_list.make_list(areas, rule, **settings)
    images, labels = cache.gather_slices(cached, chosen.entries)
    looks = appearance.record_of(cached, window=window_of(data), layout=data.layout)
    summary = chosen.summary(areas, table.names)
    return FewShotData(images, labels, chosen, summary, _digest(cached), looks)


def validation_data(
    data: ConfigDict, image_size: int, min_pixels: int, split: Split, workdir
) -> ValidationData:
    """Returns all valid slices of the validation cases."""
    cached = read_cases(data, image_size, split.validation, split.table, workdir)
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
    return ValidationData(*found, split.table.num_classes, len(cached), _digest(cached))


def read_cases(
    data: ConfigDict, image_size: int, cases, table: LabelTable, workdir
) -> list[cache.CachedCase]:
    """Returns the cache files of cases, creating missing ones."""
    bar = tqdm(total=len(cases), desc="reading volumes", unit="case", leave=False)
    with bar:
        return cache.build_cache(
            cases,
            table,
            window_of(data),
            image_size,
            data.cache_dir or Path(workdir) / "cache",
            progress=lambda done, total, case: bar.update(done - bar.n),
            levels=data.levels,
            axis=data.axis,
        )


def _digest(cached: list[cache.CachedCase]) -> str:
    keys = "".join(f"{case.case_id} {case.meta['key']}\n" for case in cached)
    return hashlib.sha256(keys.encode()).hexdigest()


def images_digest(cases) -> str:
    """Returns the SHA-256 of the image files of cases, with their ids."""
    files = "".join(f"{case.case_id} {volumes.digest(case.image)}\n" for case in cases)
    return hashlib.sha256(files.encode()).hexdigest()


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
