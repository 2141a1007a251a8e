"""FSSP-SAM on Synapse (BTCV), 10 % of the slices: a linear classifier of features prompts SAM.

Command:  python -m pgpsam_jax.main --config configs/fssp.py --workdir runs/fssp
Data:     as configs/synapse.py.
Weights:  as configs/synapse.py; SAM works as it is.
Recipe:   no training: the encoder sees every slice of the list once, as it is, and a logistic
          regression of each organ against the rest is fitted to all tokens (L2, C = 1, slopes below
          1e-4 or 1000 iterations: scikit-learn's defaults, which the original uses). That is one
          step of the run; its checkpoint is number 1. Adapted: eight organs (the original: one),
          the common list (ten images), 512 px (1024); the box grows by a fixed 9.5 / 16 of a
          token's side (at random by 0 to 19 px).
Expected: not measured: neither data nor weights could be had.
Cost:     one forward pass of the encoder per slice of the list; 2,056 numbers are fitted.
Variants: --config.model.prompt=point or box; the default gives SAM both.
"""

from pgpsam_jax.config import default_config, method_recipes


def get_config():
    config = default_config()
    config.name = "fssp"
    config.model.base = "weights/sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    method_recipes.use(config, "fssp")
    return config
