"""SAM-LST: a ResNet-18 beside SAM's frozen encoder, mixed by a learned gate (Chai et al. 2023).

Letters: B batch, S image side, H W token grid, C channels, K classes with background.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, losses
from pgpsam_jax.models.baselines.resnet import ResNet18
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import SamSegmenter, register


@register("samlst")
class SamLst(SamSegmenter):
    """Images (B, S, S, 3) to `final` logits (B, 4H, 4W, K); trains CNN, gate and upscaling.

    The decoder sees g * SAM's feature + (1 - g) * the CNN's, with g = sigmoid(a) of a scalar a.
    """

    label = "SAM-LST"
    loss = staticmethod(losses.final_only)
    cnn_prefix = "cnn"
    frozen = (  # with the mask tokens and their hypernetworks, one per class
        "prompt_encoder",
        "mask_decoder/transformer",
        "mask_decoder/mask_tokens",
        "mask_decoder/hyper_mlps",
        "mask_decoder/iou_token",
        "mask_decoder/iou_head",
    )

    def __init__(
        self,
        sam: SamConfig,
        masks: int,
        *,
        lora: LoraConfig | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(sam, masks, lora=lora, dtype=dtype, rngs=rngs)
        width, stride = sam.decoder.width // 4, sam.encoder.patch_size
        self.cnn = ResNet18(width, stride, dtype=dtype, rngs=rngs)
        self.gate = initializers.zeros_param()

    def encode(self, images):
        """SAM's feature (B, H, W, C) and, for the CNN that trains, the images."""
        return {"feature": super().encode(images), "images": images}

    def segment(self, encoded, keys=None):
        feature = encoded["feature"]
        beside = self.cnn(encoded["images"], training=keys is not None)
        share = jax.nn.sigmoid(self.gate[...]).astype(feature.dtype)
        mixed = share * feature + (1 - share) * beside
        return {"final": self.mask_decoder.masks(*self.transform(mixed))}
