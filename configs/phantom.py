"""The built-in default: 30 abdominal CT phantoms, eight organs, 155 labelled slices.

Command:  python -m pgpsam_jax.main --config configs/phantom.py --workdir runs/phantom
Data:     generated into datasets/phantom at the first run (39 MB, BTCV layout, the 18/12 split).
Expected: TO MEASURE
Time:     TO MEASURE
Model:    PGP-SAM, preset paper, on a four-block encoder at 128 px trained from scratch (there are
          no SAM weights of that size), hence the lower learning rate and the gradient clipping.
"""

from pgpsam_jax.config import default_config, use_small_encoder


def get_config():
    config = default_config()
    config.name = "phantom"
    config.data.layout = "phantom"
    config.data.root = "datasets/phantom"
    config.fewshot.fraction = 0.25
    config.train.steps = 800
    use_small_encoder(config)
    return config
