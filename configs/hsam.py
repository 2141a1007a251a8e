"""H-SAM on Synapse (BTCV), 10 % of the slices: the method PGP-SAM took its loss from.

Command:  python -m pgpsam_jax.main --config configs/hsam.py --workdir runs/hsam
Data:     as configs/synapse.py.
Weights:  sam_vit_b_01ec64.pth, converted to weights/sam_vit_b (docs/weights.md): encoder,
          prompts and first decoder. The second decoder starts at random, as in the original.
Recipe:   the authors': LoRA of rank 5, AdamW at 2.5e-3, 0.1 CE + 0.9 Dice, warm-up, polynomial
          decay (0.9), 300 epochs. Adapted to the common protocol: batch 12 (16 on two devices),
          the list, image size and augmentation of all methods (theirs: 221 of all slices, crops of
          0.2 to 0.8), tested at the size it was trained at (theirs: by way of 224 px).
Expected: its own paper reports 4.78 points of Dice more than other forms of SAM without prompts at
          10 % of the slices; the paper of PGP-SAM has no row for it. Not measured here: neither
          the data nor the weights could be had when this was written.
Cost:     24.0 M parameters train, of which 12.7 M have no gradient (docs/methods.md).
Variants: --config.model.mask_gate=intended, where those 12.7 M take part.
"""

from pgpsam_jax.config import default_config, method_recipes


def get_config():
    config = default_config()
    config.name = "hsam"
    config.model.base = "weights/sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    method_recipes.use(config, "hsam")
    return config
