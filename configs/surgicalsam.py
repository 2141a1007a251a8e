"""SurgicalSAM on Synapse (BTCV), 10 % of the slices: prototypes as prompts, SAM's decoder trained.

Command:  python -m pgpsam_jax.main --config configs/surgicalsam.py --workdir runs/surgicalsam
Data:     as configs/synapse.py.
Weights:  as configs/synapse.py; all of SAM is loaded, encoder and prompt encoder stay as they are.
Recipe:   Adam 1e-3, constant, weight decay 1e-4; sigmoid Dice + NT-Xent (temperature 0.07), 1:1;
          four prompt tokens a class (the original: two or four, by data set). Adapted to the common
          protocol: its list, batch 12, 300 epochs, its augmentation, 512 px, vit_b (the original:
          batch 32, 500 epochs, 1024 px, vit_h). The original is told, in training and at test,
          which classes an image shows; here all are asked for always, and Dice runs over the batch,
          without which a class that an image lacks would have no gradient.
Expected: not measured: neither data nor weights could be had.
Cost:     4.26 million parameters train. The encoder sees the same pictures again and again unless
          they are augmented: --config.train.encoded_copies=N keeps N augmented copies encoded.
"""

from pgpsam_jax.config import default_config, method_recipes


def get_config():
    config = default_config()
    config.name = "surgicalsam"
    config.model.base = "weights/sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    method_recipes.use(config, "surgicalsam")
    return config
