"""What every method is to the training step and the predictor, and SAM's parts that many share.

Letters: B batch, S image side, H W token grid, C channels, K classes with background.
"""

import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.sam.image_encoder import ImageEncoder
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import MaskDecoder
from pgpsam_jax.models.sam.prompt_encoder import PromptEncoder
from pgpsam_jax.models.sam.sam import SamConfig


class Segmenter(nnx.Module):
    """Images (B, S, S, 3) in [0, 1] to a dictionary of outputs that the method's loss takes.

    `final` are logits (B, h, w, K), of any size. A subclass has `encode` and `segment`, or a call
    of its own.
    """

    def encode(self, images):
        """What the encoder makes of images, with no random draw: it may be kept for good."""
        raise NotImplementedError

    def segment(self, encoded, keys=None):
        """Outputs for what `encode` returned; keys (B,), one a sample, are given in training."""
        raise NotImplementedError

    def __call__(self, images, keys=None):
        return self.segment(self.encode(images), keys)

    def predict(self, images):
        """Logits (B, h, w, K) that class ids are read from."""
        return self(images)["final"]


class SamSegmenter(Segmenter):
    """SAM's encoder and decoder with no prompt but its no-mask embedding, a mask token a class.

    Holds all of SAM's prompt encoder, as SAMed does: the rest of it has no gradient.
    """

    decoder = MaskDecoder

    def __init__(
        self,
        sam: SamConfig,
        masks: int,
        *,
        lora: LoraConfig | None = None,
        iou_head: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        self.image_encoder = ImageEncoder(sam.encoder, lora, **common)
        self.prompt_encoder = PromptEncoder(
            sam.decoder.width, sam.encoder.grid, sam.image_size, **common
        )
        self.mask_decoder = self.decoder(sam.decoder, masks, iou_head=iou_head, **common)

    def encode(self, images):
        return self.image_encoder(images)[0]

    def transform(self, feature, sparse=None, dense=None):
        """Mask tokens (B, M, C) and image tokens (B, H, W, C) of one pass of the decoder.

        Prompts are those of no prompt unless given.
        """
        default, no_mask = self.prompt_encoder(batch=feature.shape[0])
        sparse, dense = (
            x.astype(feature.dtype)
            for x in (default if sparse is None else sparse, no_mask if dense is None else dense)
        )
        positions = self.prompt_encoder.pe_layer.grid(self.prompt_encoder.grid)
        tokens, image, _ = self.mask_decoder.run(
            feature, positions.astype(feature.dtype), sparse, dense
        )
        return tokens, image


# Where the tensors of `SamSegmenter` come from in a converted SAM; mask tokens, their
# hypernetworks and the quality head are one for each class here, and start at random.
BASE_TENSORS = {
    "image_encoder": "image_encoder",
    "prompt_encoder": "prompt_encoder",
    "mask_decoder/transformer": "mask_decoder/transformer",
    "mask_decoder/upscaling": "mask_decoder/upscaling",
    "mask_decoder/iou_token": "mask_decoder/iou_token",
}
BASE_UNUSED = ("mask_decoder/mask_tokens", "mask_decoder/hyper_mlps", "mask_decoder/iou_head")


def to_input(images):
    """Grey slices (B, H, W) in [0, 1] to the three equal channels SAM takes, (B, H, W, 3)."""
    return jnp.repeat(images.astype(wide(images.dtype))[..., None], 3, axis=-1)
