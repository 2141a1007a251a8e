"""From a configuration to what training and evaluation read: cases, labels, few-shot slices."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from pgpsam_jax.data import cache, fewshot, layouts, phantom
from pgpsam_jax.data.labels import SYNAPSE8, LabelTable, load_label_table
from pgpsam_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class FewShotData:
    """The training set in memory: images (N, S, S) float16, labels (N, S, S) uint8, its list.

    `digest` is a hash of the training volumes, their labels and how they were preprocessed.
    """

    images: np.ndarray
    labels: np.ndarray
    list: fewshot.FewShotList
    summary: str
    digest: str


def label_table(config: ConfigDict) -> LabelTable:
    """The label table of `config.data`; layouts without a built-in one need a file."""
    if config.data.label_table:
        return load_label_table(config.data.label_table)
    if config.data.layout in ("btcv", "phantom"):
        return SYNAPSE8
    raise UserError(
        f"data.layout {config.data.layout!r} needs data.label_table, a JSON file that names the "
        'classes: {"classes": [{"name": "spleen", "source": [1]}, ...]}'
    )


def find_split(config: ConfigDict) -> tuple[list[layouts.Case], list[layouts.Case], LabelTable]:
    """Training cases, test cases and the label table; the phantom is generated where it lacks."""
    data, table = config.data, label_table(config)
    if not data.root:
        raise UserError("data.root is empty; set --config.data.root to the folder of the data set")
    layout = data.layout
    if layout == "phantom":
        phantom.generate(data.root, seed=data.phantom_seed)
        layout = "btcv"
    cases = layouts.find_cases(layout, data.root, data.image_glob or None, data.label_glob or None)
    train, test = layouts.split_cases(
        cases,
        data.split,
        file=data.split_file or None,
        test_fraction=data.test_fraction,
        seed=data.split_seed,
    )
    return train, test, table


def few_shot_data(
    config: ConfigDict, cases, table: LabelTable, workdir, *, resume: bool
) -> FewShotData:
    """Slices of the few-shot list, by way of the cache; on resume, of the workdir's own list."""
    workdir = Path(workdir)
    bar = tqdm(total=len(cases), desc="reading volumes", unit="case", leave=False)
    with bar:
        cached = cache.build_cache(
            cases,
            table,
            tuple(config.data.window),
            config.model.image_size,
            config.data.cache_dir or workdir / "cache",
            progress=lambda done, total, case: bar.update(done - bar.n),
        )
    areas = {case.case_id: case.areas for case in cached}
    settings = dict(config.fewshot)
    file, rule = settings.pop("file"), settings.pop("rule")
    if resume:
        chosen = stored_list(workdir, areas)
    elif file:
        chosen = fewshot.read_list(file, areas)
    else:
        chosen = fewshot.make_list(areas, rule, **settings)
    images, labels = cache.gather_slices(cached, chosen.entries)
    keys = "".join(f"{case.case_id} {case.meta['key']}\n" for case in cached)
    digest = hashlib.sha256(keys.encode()).hexdigest()
    return FewShotData(images, labels, chosen, chosen.summary(areas, table.names), digest)


def stored_list(workdir, areas=None) -> fewshot.FewShotList:
    """The few-shot list a workdir was trained on."""
    return fewshot.read_list(Path(workdir) / "fewshot.txt", areas)


def unseen_slices(config: ConfigDict, table: LabelTable, entries):
    """(case id, truth (D, H, W)) -> boolean (D,): slices of the few-shot pool not trained on."""
    trained: dict[str, list[int]] = {}
    for case_id, index in entries:
        trained.setdefault(case_id, []).append(index)

    def region(case_id: str, truth: np.ndarray) -> np.ndarray:
        areas = cache.slice_areas(truth, table.num_classes)
        mask = fewshot.in_pool(areas, config.fewshot.pool, config.fewshot.min_pixels)
        mask[trained.get(case_id, [])] = False
        return mask

    return region
