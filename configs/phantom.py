"""Embedded default."""

from pgpsam_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "phantom"
    config.data.layout = "phantom"
    config.data.root = "datasets/phantom"
    config.model.encoder = "vit_t"
    config.model.train_encoder = "full"
    config.model.image_size = 160
    config.model.patch_size = 8
    config.fewshot.fraction = 0.25
    config.train.batch_size = 8
    config.train.steps = 300
    config.log.checkpoint_steps = 100
    return config
