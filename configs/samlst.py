"""SAM-LST on Synapse (BTCV), 10 % of the slices: a row of Table 1 (Chai et al. 2023).

Command:  python -m pgpsam_jax.main --config configs/samlst.py --workdir runs/samlst
Data:     as configs/synapse.py.
Weights:  as configs/synapse.py, and the CNN's, torchvision's ResNet-18 of ImageNet:
          python -m weights_conversion.convert --kind resnet18 --source resnet18-f37072fd.pth \\
              --output weights/resnet18
          Without them, --config.model.cnn_base= starts the CNN at random and says so everywhere.
Recipe:   the authors', which is SAMed's with SAM frozen: AdamW at 1e-3, warm-up, polynomial decay,
          0.2 cross-entropy + 0.8 Dice at 128 px. Adapted: batch 12 in place of 24 on two devices,
          slices of 512 px in place of ones stored at 224, the common length of a run.
Expected: PGP-SAM's Table 1 has a row for it with a recipe that is not told. Not measured here:
          neither the data nor the weights could be had.
Cost:     SAM's encoder needs to see a slice only once: --config.train.encoded_copies=8 encodes
          every slice in 8 augmented copies beforehand and keeps them with their images.
"""

from pgpsam_jax.config import default_config, method_recipes


def get_config():
    config = default_config()
    config.name = "samlst"
    config.model.base = "weights/sam_vit_b"
    config.model.cnn_base = "weights/resnet18"
    config.data.layout = "btcv"
    config.data.root = "datasets/btcv"
    config.fewshot.fraction = 0.10
    method_recipes.use(config, "samlst")
    return config
