"""H-SAM: SAMed, and a second decoder that the masks of the first one guide (Cheng et al. 2024).

Letters: B batch, S image side, H W token grid, C channels, K classes with background.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.models import layers
from pgpsam_jax.models.baselines.hsam_decoder import FirstDecoder, SecondDecoder, add_noise
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import class_features, token_products, upsample_logits
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import SamSegmenter, register


@register("hsam")
class Hsam(SamSegmenter):
    """Images (B, S, S, 3) to logits `bootstrap` (B, 4H, 4W, K) and `final` (B, 16H, 16W, K).

    `final` has the size of the image where patches have 16 pixels.
    """

    decoder = FirstDecoder
    label = "H-SAM"
    sam_start = {  # what the second decoder has in the shape of SAM's
        rf"second/({part}/.*)": r"mask_decoder/\1"
        for part in (
            "upscaling",
            r"transformer/layers/\d+/(?:self_attn|mlp|norm\d)",
            "transformer/(?:final_attn_token_to_image|norm_final_attn)",
        )
    }

    @classmethod
    def options(cls, settings):
        return super().options(settings) | {"mask_gate": settings.mask_gate}

    def __init__(
        self,
        sam: SamConfig,
        classes: int,
        *,
        mask_gate: str,
        lora: LoraConfig | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = dict(dtype=dtype, rngs=rngs)
        super().__init__(sam, classes, lora=lora, **common)
        self.second = SecondDecoder(
            sam.decoder, classes, sam.encoder.grid, mask_gate=mask_gate, **common
        )

    def segment(self, feature, keys=None):
        tokens, image = self.transform(feature)
        up = self.mask_decoder.upscaling(image)
        first = token_products(up, self.mask_decoder.hyper_mlps(tokens))
        probability = jax.nn.softmax(layers.resize_bilinear(first, feature.shape[1:3]))
        if keys is not None:
            feature = add_noise(feature, keys)
        _, dense = self.prompt_encoder(batch=feature.shape[0])
        positions = self.prompt_encoder.pe_layer.grid(self.prompt_encoder.grid)
        second = self.second(
            feature + dense.astype(feature.dtype),
            positions.astype(feature.dtype),
            class_features(tokens, image),
            probability,
            up,
            keys,
        )
        return {"bootstrap": first, "final": second}

    def predict(self, images):
        """The mean of both outputs' logits at the size of the image, (B, S, S, K)."""
        outputs, size = self(images), self.prompt_encoder.image_size
        first, second = (upsample_logits(outputs[name], size) for name in ("bootstrap", "final"))
        return (first + second) / 2
