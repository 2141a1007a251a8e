"""Hippocampus on T1 MR, real volumes with experts' labels, few of them used for training.

Command:  pgpsam train --config hippocampus:5volumes --config.data.root=FOLDER
Data:     Task04_Hippocampus of the Medical Segmentation Decathlon (Antonelli et al. 2022, doi
          10.1038/s41467-022-30695-9, CC-BY-SA 4.0), its folder or that of nnU-Net's raw layout:
          crops of about 35 x 50 x 36 voxels of 1 mm, classes anterior and posterior.
Budget:   after the colon: Nvolumes (all slices of N volumes) or Nslices (of all training volumes),
          such as 1volumes, 20volumes, 5slices, 100slices. --config.fewshot.seed=N draws others.
Split:    by person, two volumes each (configs/labels/hippocampus_persons.csv, docs/data.md): a seed
          holds out 30 % of the persons for testing and 10 % for validation, which is off
          (--config.validation.every_epochs=N).
Slices:   sagittal, of which 85 % show both classes (36 % of axial and 1 % of coronal ones do),
          enlarged to 56 px, whose 14 x 14 tokens LiteMedSAM's windows of 7 and 14 divide.
          Intensities are normalized by percentiles of each volume.
Weights:  pgpsam fetch lite_medsam (docs/weights.md).
Expected: 20slices with train.steps=150, train.batch_size=8, six seeds, mean Dice (strict) of the 62
          test volumes: 0.756 (SD 0.005); with model.preset=plus 0.776 (0.015), and with its encoder
          frozen 0.780 (0.013). SAMed 0.732, U-Net 0.745 (docs/results/real).
"""

import re

from pgpsam_jax.config import default_config, use_lite_medsam


def get_config(budget: str = "5volumes"):
    parts = re.fullmatch("([1-9][0-9]{0,3})(volumes|slices)", budget)
    if parts is None:
        raise ValueError(
            f"configs/hippocampus.py knows no budget {budget!r}; write Nvolumes or Nslices"
        )
    config = default_config()
    config.name = f"hippocampus_{budget}"
    config.data.layout = "nnunet"
    config.data.label_table = "configs/labels/hippocampus.json"
    config.data.normalize = "percentile"
    config.data.axis = "sagittal"
    config.data.split = "group"
    config.data.group_file = "configs/labels/hippocampus_persons.csv"
    config.data.test_fraction = 0.3
    config.data.validation_fraction = 0.1
    config.fewshot.min_pixels = 20
    if parts[2] == "volumes":
        config.fewshot.rule = "volumes"
        config.fewshot.volumes = int(parts[1])
    else:
        config.fewshot.count = int(parts[1])
    config.train.steps = 400
    use_lite_medsam(config, image_size=56)
    return config
