"""PGP-SAM on Synapse (BTCV) as the authors' code trains it: preset `release`, its data and recipe.

Command:  pgpsam train --config synapse_release --workdir runs/release
Data:     as configs/synapse.py, stored in 8 bits; train 18, validation 6, test 6 patients.
List:     the authors' rule, 10 % of the valid slices, those with the largest organ area by the
          labels, seed 42.
Recipe:   LoRA rank 5; rotation, elastic and window with three kinds of noise; validation on all
          valid slices of the six cases after each epoch; the best epoch's weights are evaluated.
Weights:  as configs/synapse.py; of SAM the encoder and the two-way transformer are loaded.
Expected: the paper prints 78.75 mean Dice; whether with this code is unknown. Not measured here:
          neither the data nor the weights were available.
Cost:     488 GFLOP per slice and step, 225 per forward pass. Validating 420 slices after each of
          300 epochs costs 1.6 times the training; --config.validation.every_epochs=10 avoids it.
Fixed:    two bugs of the original; --config.augment.label_warp=linear and
          --config.augment.seeded=False restore them (docs/release.md).
"""

from pgpsam_jax.config import default_config, use_release_recipe


def get_config():
    config = default_config()
    config.name = "synapse_release"
    config.model.base = "sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.data.split = "btcv_18_6_6"
    config.fewshot.fraction = 0.10
    use_release_recipe(config)
    return config
