"""The smallest SAM that has every part, for tests of wiring: compiling is what they cost.

Importing this makes `vit_micro` a `model.encoder`: 4 heads, one window and one global block, and
one block in the decoder.
"""

import dataclasses

from pgpsam_jax.models.sam import sam
from pgpsam_jax.models.sam.image_encoder import EncoderConfig

NAME = "vit_micro"
sam._ENCODERS[NAME] = (
    EncoderConfig,
    dict(width=32, depth=2, heads=4, global_blocks=(1,), window_size=4, out_channels=32),
)
_preset = sam.SamConfig.preset


def _with_micro(_, name: str, *sizes, **encoder):
    made = _preset(name, *sizes, **encoder)
    if name != NAME:
        return made
    decoder = dataclasses.replace(made.decoder, depth=1, heads=2, mlp_dim=64)
    return dataclasses.replace(made, decoder=decoder)


sam.SamConfig.preset = classmethod(_with_micro)
