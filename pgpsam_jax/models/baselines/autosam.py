"""AutoSAM: SAM's frozen encoder, its decoder once per class, no prompt (Hu et al. 2023).

Letters: B batch, H W token grid, C channels, K classes with background.
"""

import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import initializers, layers, losses
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import DecoderConfig, Upscaling, token_products
from pgpsam_jax.models.sam.prompt_encoder import FourierPositions
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.sam.two_way_transformer import TwoWayTransformer
from pgpsam_jax.models.segmenter import Segmenter, register

MASKS = 2  # mask tokens of a class; the first one's mask is the class's


class ClassDecoder(nnx.Module):
    """SAM's mask decoder, shared by the classes; each has a quality token and two mask tokens.

    The output at the quality token is not used; the token is random and frozen.
    """

    def __init__(self, config: DecoderConfig, classes: int, *, dtype, rngs: nnx.Rngs):
        d, common = config.width, dict(dtype=dtype, rngs=rngs)
        self.transformer = TwoWayTransformer(
            d, config.depth, config.heads, config.mlp_dim, config.downsample, **common
        )
        self.upscaling = Upscaling(d, **common)
        self.hyper_mlps = layers.ParallelMlp(MASKS, (d, d, d, d // 8), **common)
        self.mask_tokens = initializers.normal_param(rngs, classes, MASKS, d)
        self.iou_token = initializers.normal_param(rngs, classes, 1, d)

    def __call__(self, image, image_pe):
        """image (B, H, W, C), image_pe (H, W, C) to logits (B, 4H, 4W, K), float32.

        All classes of all images are one batch (B K): they are independent.
        """
        b, h, w, d = image.shape
        own = jnp.concatenate([self.iou_token[...], self.mask_tokens[...]], axis=1)
        k, t, _ = own.shape
        tokens = jnp.broadcast_to(own.astype(image.dtype), (b, k, t, d)).reshape(b * k, t, d)
        source = jnp.broadcast_to(image[:, None], (b, k, h, w, d)).reshape(b * k, h * w, d)
        tokens, source = self.transformer(source, image_pe.reshape(1, h * w, d), tokens)
        up = self.upscaling(source.reshape(b * k, h, w, d))
        weights = self.hyper_mlps(tokens[:, 1:])[:, :1]
        return jnp.moveaxis(token_products(up, weights).reshape(b, k, 4 * h, 4 * w), 1, -1)


@register("autosam")
class AutoSam(Segmenter):
    """Images (B, S, S, 3) to `final` logits (B, 4H, 4W, K); trains the decoder.

    Its position encoding is random, not SAM's.
    """

    label = "AutoSAM"
    loss = staticmethod(losses.entropy_and_foreground_dice)
    base_tensors = {
        "image_encoder": "image_encoder",
        "mask_decoder/transformer": "mask_decoder/transformer",
        "mask_decoder/upscaling": "mask_decoder/upscaling",
        "mask_decoder/hyper_mlps": "mask_decoder/hyper_mlps",
    }
    base_rows = {"mask_decoder/hyper_mlps": MASKS}  # of SAM's four hypernetworks, the first
    class_tokens = {"mask_decoder/mask_tokens": "mask_decoder/mask_tokens"}  # both of a class
    base_unused = (
        "prompt_encoder",
        "mask_decoder/iou_token",
        "mask_decoder/mask_tokens",
        "mask_decoder/iou_head",
    )
    frozen = ("mask_decoder/iou_token",)

    def __init__(
        self,
        sam: SamConfig,
        classes: int,
        *,
        lora: LoraConfig | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        self.image_encoder = sam.encoder.make(lora, **common)
        self.pe_layer = FourierPositions(sam.decoder.width, rngs=rngs)
        self.mask_decoder = ClassDecoder(sam.decoder, classes, **common)
        self.grid = sam.encoder.grid

    def encode(self, images):
        return self.image_encoder(images)[0]

    def segment(self, feature, keys=None):
        positions = self.pe_layer.grid(self.grid).astype(feature.dtype)
        return {"final": self.mask_decoder(feature, positions)}
