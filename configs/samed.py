"""SAMed on Synapse (BTCV), 10 % of the slices: LoRA on SAM, no prompts.

Command:  python -m pgpsam_jax.main --config configs/samed.py --workdir runs/samed
Data:     as configs/synapse.py.
Weights:  sam_vit_b_01ec64.pth, converted to weights/sam_vit_b (docs/weights.md): encoder,
          prompt encoder, the decoder's transformer and upscaling.
Recipe:   the authors': LoRA of rank 4 on q and v, AdamW at 5e-3, weight decay 0.1, warm-up of 250
          steps, polynomial decay (0.9) over 1.25 times the run (theirs: over 200 epochs, stopped at
          160), 0.2 CE + 0.8 Dice at a quarter of the image's side. Adapted to the common protocol:
          batch 12 (24 on two devices), 300 epochs of the few-shot list, its augmentation (theirs:
          quarter turns and flips), no detour through 224 px.
Expected: the paper of PGP-SAM prints 73.91 mean Dice for its few-shot SAMed, without a recipe. Not
          measured here: neither the data nor the weights could be had when this was written.
Cost:     4.9 M parameters train, of which LoRA 0.15 M.
"""

from pgpsam_jax.config import default_config, method_recipes


def get_config():
    config = default_config()
    config.name = "samed"
    config.model.base = "weights/sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    method_recipes.use(config, "samed")
    return config
