"""AutoSAM on Synapse (BTCV), 10 % of the slices: a row of Table 1 (Hu et al. 2023).

Command:  python -m pgpsam_jax.main --config configs/autosam.py --workdir runs/autosam
Data:     as configs/synapse.py.
Weights:  as configs/synapse.py; of SAM the encoder, and of the decoder the transformer, the
          upscaling and two of four hypernetworks are loaded.
Recipe:   the authors': encoder frozen, Adam at 5e-4 without weight decay, batch 4, cross-entropy +
          foreground Dice. Adapted: 512 px in place of 1024, the common augmentation and length of
          a run in place of theirs (120 epochs), and a constant rate. They lower it when the last
          training batch's loss has not improved for ten epochs; with one batch, that is noise.
Expected: PGP-SAM's Table 1 has a row for it with a recipe that is not told. Not measured here:
          neither the data nor the weights could be had.
Cost:     the decoder runs once a class, nine times. The encoder needs to see a slice only once:
          --config.train.encoded_copies=8 encodes every slice in 8 augmented copies beforehand.
"""

from pgpsam_jax.config import default_config, method_recipes


def get_config():
    config = default_config()
    config.name = "autosam"
    config.model.base = "weights/sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    method_recipes.use(config, "autosam")
    return config
