"""The built-in default: 30 abdominal CT phantoms, eight organs, 155 labelled slices.

Command:  python -m pgpsam_jax.main --config configs/phantom.py --workdir runs/phantom
Data:     generated into datasets/phantom at the first run (39 MB, BTCV layout, the 18/12 split).
Expected: TO MEASURE
Time:     TO MEASURE
Model:    PGP-SAM, preset paper, on a four-block encoder at 128 px trained from scratch (there are
          no SAM weights of that size), hence the lower learning rate and the gradient clipping.
"""

from pgpsam_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "phantom"
    config.data.layout = "phantom"
    config.data.root = "datasets/phantom"
    config.fewshot.fraction = 0.25
    config.model.encoder = "vit_t"
    config.model.train_encoder = "full"
    config.model.image_size = 128
    config.model.patch_size = 8
    config.optim.learning_rate = 1e-3
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 1.0
    config.train.batch_size = 4
    config.train.steps = 800
    config.log.checkpoint_steps = 200
    return config
