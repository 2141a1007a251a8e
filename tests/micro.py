"""The smallest SAM that has every part, for tests of wiring: compiling is what they cost.

Importing this makes `vit_micro` a `model.encoder`: 4 heads, one window and one global block.
"""

from pgpsam_jax.models import sam

NAME = "vit_micro"
sam._VIT[NAME] = dict(
    width=32, depth=2, heads=4, global_blocks=(1,), window_size=4, out_channels=32
)
