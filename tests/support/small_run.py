"""A run small enough for tests, with every real part: NIfTI pairs, cache, list, model, scores."""

import json

import nibabel as nib
import numpy as np

from pgpsam_jax.config import default_config
from pgpsam_jax.data import dataset
from pgpsam_jax.data.cache import build_cache
from pgpsam_jax.data.preprocessing import Preprocessing
from tests.support import micro

SHAPE, SPACING = (24, 20, 10), (1.5, 2.0, 4.0)
TABLE = {
    "classes": [{"name": "liver", "source": [6]}, {"name": "spleen", "source": [1]}],
    "other": "background",
}
NAMES = ("background", "liver", "spleen")


def write_data(root, cases=("a", "b", "c"), seed=0):
    """Folder pairs with a bright ball (liver) and a brighter one (spleen) per case, LPS storage."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    for case in cases:
        label = np.zeros(SHAPE, np.int16)
        for source, center in ((6, (7, 9, 5)), (1, (16, 11, 5))):
            away = (grid - center - rng.uniform(-1, 1, 3)) * SPACING
            label[np.linalg.norm(away, axis=-1) < 7] = source
        image = np.where(label == 6, 110, np.where(label == 1, 200, -60))
        image = (image + rng.normal(0, 10, SHAPE)).astype(np.int16)
        affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
        affine[:3, 3] = (30, 20, -100)
        for folder, array in (("images", image), ("labels", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), root / folder / f"{case}.nii.gz")
    (root / "table.json").write_text(json.dumps(TABLE))
    (root / "split.json").write_text(json.dumps({"train": list(cases[:-1]), "test": [cases[-1]]}))
    return root


def hold_out(root, validation):
    """Make one of the training cases of `write_data` the validation case."""
    split = json.loads((root / "split.json").read_text())
    split["train"].remove(validation)
    (root / "split.json").write_text(json.dumps(split | {"validation": [validation]}))


def cached_cases(config, split, workdir, cases=None):
    """The training cases, or others, through the cache of a workdir, as training reads them."""
    cases = split.train if cases is None else cases
    preprocessing = Preprocessing.from_config(config.data, config.model.image_size)
    return build_cache(cases, split.table, preprocessing, workdir / "cache")


def few_shot_data(config, split, workdir):
    """The training set as a new run reads it."""
    cached = cached_cases(config, split, workdir)
    return dataset.few_shot_data(cached, config.fewshot, split.table.names)


def config_for(root, **settings):
    """Configuration of a few steps on `write_data`'s folder; settings as `model__k=2`."""
    config = default_config()
    config.name = "small"
    config.model.encoder = micro.NAME
    config.model.train_encoder = "full"
    config.model.image_size = 32
    config.model.patch_size = 8
    config.data.layout = "pairs"
    config.data.root = str(root)
    config.data.image_glob = "images/*.nii.gz"
    config.data.label_glob = "labels/*.nii.gz"
    config.data.label_table = str(root / "table.json")
    config.data.split = "file"
    config.data.split_file = str(root / "split.json")
    config.fewshot.count = 7
    config.fewshot.min_pixels = 1
    config.train.batch_size = 8
    config.train.steps = 6
    config.log.every_steps = 1
    config.log.checkpoint_steps = 2
    config.log.report = False  # takes seconds
    config.eval.workers = 0
    for name, value in settings.items():
        section, field = name.split("__")
        config[section][field] = value
    return config
