"""The phantoms of configs/phantom.py from LiteMedSAM, a pretrained medical SAM, at 128 px.

Command:  pgpsam train --config phantom_lite_medsam --workdir runs/phantom_lite_medsam
Data:     as configs/phantom.py, with the same 155 labeled slices.
Weights:  pgpsam fetch lite_medsam (docs/weights.md).
Model:    PGP-SAM, preset paper. The encoder is frozen, and the slices are encoded beforehand, in
          three augmented copies each: a step takes the time of the decoder's passes.
Expected: mean Dice (strict, class mean) 0.942 on the 12 held-out phantoms, pancreas lowest with
          0.896; configs/phantom.py has 0.811 from random weights.
Time:     11 minutes on two CPU cores with other work beside it (encoding 1, training 8, evaluation
          1.5), 9 GB of memory.
"""

from pgpsam_jax.config import default_config, use_lite_medsam


def get_config():
    config = default_config()
    config.name = "phantom_lite_medsam"
    config.data.layout = "phantom"
    config.data.root = "datasets/phantom"
    config.fewshot.fraction = 0.25
    use_lite_medsam(config, image_size=128)
    config.model.train_encoder = "frozen"
    config.train.encoded_copies = 3
    config.train.batch_size = 8
    config.train.steps = 300
    return config
