"""A compared method on Synapse (BTCV), 10 % of the slices: a row of Table 1, `baseline.py:NAME`.

Command:  pgpsam train --config baseline:samed --workdir runs/samed
NAME:     samed, hsam, autosam, samlst, surgicalsam, fssp, sam (an ORACLE: it is given the labels);
          unet or unet_large (1.9 and 7.8 M parameters), which have no SAM.
Data:     as configs/synapse.py.
Weights:  as configs/synapse.py, none for unet; samlst also takes ImageNet weights for its CNN:
          pgpsam convert --kind resnet18 --source resnet18-f37072fd.pth \\
              --output weights/resnet18
          With --config.model.cnn_base= the CNN starts at random, and every report says so.
Recipe:   the authors', adapted to the common protocol: docs/methods.md.
Expected: not measured: neither the data nor the weights were available. The paper of PGP-SAM
          prints rows for these methods, without their recipes (73.91 mean Dice for SAMed).
"""

from pgpsam_jax.config import default_config, method_recipes

NAMES = ("samed", "hsam", "autosam", "samlst", "surgicalsam", "fssp", "sam", "unet", "unet_large")


def get_config(name: str = ""):
    if name not in NAMES:
        raise ValueError(f"no baseline {name!r}; write one of {', '.join(NAMES)} after the colon")
    config = default_config()
    config.name = name
    config.model.base = "sam_vit_b"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    if name == "samlst":
        config.model.cnn_base = "weights/resnet18"
    method_recipes.apply_recipe(config, name.removesuffix("_large"))
    if name == "unet_large":
        config.model.unet_width = 32
    return config
