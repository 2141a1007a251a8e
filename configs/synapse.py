"""PGP-SAM on Synapse (BTCV), 10 % of the slices: the paper's main run (Table 1).

Command:  pgpsam train --config synapse --workdir runs/synapse
Data:     BTCV RawData (30 abdominal CTs with labels, Synapse project syn3193805), unpacked to
          datasets/btcv/RawData/Training/{img,label}, or another --config.data.root=FOLDER.
Weights:  pgpsam fetch sam_vit_b (docs/weights.md).
Expected: the paper prints 78.75 mean Dice (its own organ columns average 79.40) and does not
          specify slices, cases and empty-mask rule. Not measured here: neither the data nor the
          weights were available.
Cost:     10 % of the valid slices is about 126; 300 epochs of 126 slices at 454 GFLOP each are
          1.7e16 FLOP, under a minute of one H100 at 40 % utilization. Not measured.
Variants: --config.fewshot.rule=area (the authors' label-area rule), --config.fewshot.pool=all
          (10 % of all slices, 221 of them), --config.model.compute_dtype=bfloat16 on accelerators.
"""

from pgpsam_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "synapse"
    config.model.base = "sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    return config
