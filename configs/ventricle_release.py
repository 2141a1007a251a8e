"""PGP-SAM on head CT, four ventricles, as the authors' code trains it: preset `release`.

Command:  pgpsam train --config ventricle_release --workdir runs/ventricle
Data:     as configs/ventricle.py, split by seed: an eighth of the patients for validation and an
          eighth for testing (the authors split 800 volumes by index into 600, 100 and 100).
List:     the authors' rule, 5 % of the slices as their code runs it (the paper says 10 %).
Recipe:   that of configs/synapse_release.py with the ventricles' HU window, learning rate and
          batch. Their crop around the head is left out.
Expected: the paper prints 76.39 mean Dice on private data. Not measured here.
"""

from pgpsam_jax.config import default_config, use_release_recipe


def get_config():
    config = default_config()
    config.name = "ventricle_release"
    config.model.base = "sam_vit_b"
    config.data.layout = "pairs"
    config.data.root = "datasets/ventricle"
    config.data.image_glob = "images/*.nii.gz"
    config.data.label_glob = "labels/*.nii.gz"
    config.data.label_table = "configs/labels/ventricles.json"
    config.data.window = (10.0, 90.0)
    config.data.split = "fraction"
    config.data.test_fraction = 0.125
    config.data.validation_fraction = 0.125
    config.fewshot.fraction = 0.05
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 16
    use_release_recipe(config)
    return config
