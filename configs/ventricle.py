"""PGP-SAM on head CT, four ventricles, 10 % of the slices: the paper's second data set (Table 2).

Command:  pgpsam train --config ventricle --workdir runs/ventricle
Data:     your own datasets/ventricle/{images,labels}/CASE.nii.gz, or another
          --config.data.root=FOLDER, with label ids 1 right, 2 left, 3 third, 4 fourth
          (configs/labels/ventricles.json); the paper's 500 cases are private. A seed holds out 20 %
          of the patients, or --config.data.split=file --config.data.split_file=split.json.
Weights:  as configs/synapse.py.
Expected: the paper prints 76.39 mean Dice on its private data. Not measured here.
Settings: HU window 10..90, lr 1e-3 and batch 16 (the authors' release).

Variant:  head_mr: one head MR, a FOLDER with t1.nii.gz and ventricles4.nii.gz (256^3, software
          labels, source ids 1 left and 2 right), and a small encoder trained from scratch:
          pgpsam train --config ventricle:head_mr --config.data.root=FOLDER
          Mean Dice 0.783 on the slices with a ventricle that were not trained on: slices of the
          same patient, so no claim of accuracy (docs/results/README.md).
"""

from pgpsam_jax.config import default_config, use_small_encoder


def get_config(variant: str = ""):
    config = default_config()
    config.name = "ventricle"
    config.model.base = "sam_vit_b"
    config.data.layout = "pairs"
    config.data.root = "datasets/ventricle"
    config.data.image_glob = "images/*.nii.gz"
    config.data.label_glob = "labels/*.nii.gz"
    config.data.label_table = "configs/labels/ventricles.json"
    config.data.window = (10.0, 90.0)
    config.data.split = "fraction"
    config.data.test_fraction = 0.2
    config.fewshot.fraction = 0.10
    config.optim.learning_rate = 1e-3
    config.train.batch_size = 16
    if variant == "head_mr":
        config.name = "head_mr"
        config.data.root = ""
        config.data.image_glob = "t1.nii.gz"
        config.data.label_glob = "ventricles4.nii.gz"
        config.data.label_table = "configs/labels/head_mr.json"
        config.data.window = (0.0, 125.0)
        config.data.split = "within_volume"
        config.fewshot.rule = "every"
        config.fewshot.fraction = None
        config.fewshot.every = 3
        config.fewshot.min_pixels = 20
        config.train.steps = 600
        use_small_encoder(config)
    elif variant:
        raise ValueError(f"configs/ventricle.py knows no variant {variant!r}; use head_mr or none")
    return config
