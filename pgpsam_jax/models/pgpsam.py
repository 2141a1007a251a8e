"""PGP-SAM, preset `paper`: prompts from prototypes, a bootstrap pass and refinement stages.

Letters: B batch, H W token grid, C channels, K classes with background, Q inter prototypes.
Source: Yan et al., PGP-SAM (2025), sections 2.1-2.3; equations live in cfm.py, ppr.py, ppg.py.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import layers
from pgpsam_jax.models.cfm import ContextualFeatureModulation
from pgpsam_jax.models.image_encoder import ImageEncoder
from pgpsam_jax.models.lora import LoraConfig
from pgpsam_jax.models.mask_decoder import MaskDecoder, class_features
from pgpsam_jax.models.ppg import PromptGenerator
from pgpsam_jax.models.ppr import PrototypeRefinement
from pgpsam_jax.models.prompt_encoder import FourierPositions
from pgpsam_jax.models.sam import SamConfig


@dataclasses.dataclass(frozen=True)
class PgpSamConfig:
    """Sizes and switches; one refinement stage per entry of `stage_taps` (block indices).

    alpha: inter prototypes per class; k: those matched to each class. Empty `stage_taps` means
    the paper's two: the last and the first global-attention block of the encoder.
    """

    sam: SamConfig
    num_classes: int
    stage_taps: tuple[int, ...] = ()
    alpha: int = 8
    k: int = 4
    strip_kernel: int = 5
    cfm: bool = True
    ppr: bool = True
    ppg: bool = True
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self):
        encoder = self.sam.encoder
        if not self.stage_taps:
            taps = (encoder.global_blocks[-1], encoder.global_blocks[0])
            object.__setattr__(self, "stage_taps", taps)
        if any(not 0 <= tap < encoder.depth for tap in self.stage_taps):
            raise UserError(
                f"stage_taps {self.stage_taps} must be block indices from 0 to {encoder.depth - 1}"
            )
        if not 1 <= self.k <= self.alpha * self.num_classes:
            raise UserError(
                f"k={self.k} inter prototypes per class must lie between 1 and alpha * classes "
                f"= {self.alpha * self.num_classes}"
            )
        if self.ppr and not self.ppg:
            raise UserError(
                "model.ppr refines prototypes that only model.ppg uses; switch both on or ppr off"
            )


class PgpSam(nnx.Module):
    """Images (B, rows, columns, 3) in [0, 1] to `bootstrap` and `final` logits (B, 4H, 4W, K)."""

    def __init__(self, config: PgpSamConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        encoder, c = config.sam.encoder, config.sam.decoder.width
        classes, inter = config.num_classes, config.alpha * config.num_classes
        # A middle pass only gives PPR its class feature; without PPR its prompts would be dead.
        passes = 1 + (len(config.stage_taps) if config.ppr else 1)
        common = dict(dtype=dtype, rngs=rngs)
        self.image_encoder = ImageEncoder(encoder, config.lora, **common)
        self.pe_layer = FourierPositions(c, rngs=rngs)
        self.mask_decoder = MaskDecoder(config.sam.decoder, classes, iou_head=False, **common)
        self.cfm = nnx.List(
            ContextualFeatureModulation(
                encoder.width, c, k=config.strip_kernel, enabled=config.cfm, **common
            )
            for _ in config.stage_taps
        )
        if config.ppg:
            self.intra = layers.normal_param(rngs, classes, c)
            self.inter = layers.normal_param(rngs, inter, c)
            self.ppg = nnx.List(  # the bootstrap's, then one per later pass
                PromptGenerator(c, classes, inter, **common) for _ in range(passes)
            )
        else:
            self.default_dense = layers.normal_param(rngs, c)
        if config.ppr:
            self.ppr = nnx.List(
                PrototypeRefinement(c, classes, config.k, encoder.grid, **common)
                for _ in config.stage_taps
            )
        self.config = config

    def prompts(self, i: int, feature, prototypes):
        """Sparse (B, K or 0, C) and dense (B, H, W, C) prompts of pass i (0 is the bootstrap)."""
        if self.config.ppg:
            return self.ppg[i](feature, *prototypes)
        dense = jnp.broadcast_to(self.default_dense[...].astype(feature.dtype), feature.shape)
        return jnp.zeros((feature.shape[0], 0, feature.shape[-1]), feature.dtype), dense

    def decode(self, feature, sparse, dense):
        """One pass of the shared decoder: logits (B, 4H, 4W, K) and F_M (B, H, W, K)."""
        positions = self.pe_layer.grid(self.config.sam.encoder.grid).astype(feature.dtype)
        mask_tokens, image_tokens, _ = self.mask_decoder.run(feature, positions, sparse, dense)
        logits = self.mask_decoder.masks(mask_tokens, image_tokens)
        return logits, class_features(mask_tokens, image_tokens)

    def __call__(self, images):
        feature, taps = self.image_encoder(images, self.config.stage_taps)
        prototypes = None
        if self.config.ppg:
            prototypes = tuple(
                jnp.broadcast_to(p[...], (feature.shape[0], *p.shape))
                for p in (self.intra, self.inter)
            )
        bootstrap, class_feature = self.decode(feature, *self.prompts(0, feature, prototypes))
        for i, tap in enumerate(taps):
            feature = self.cfm[i](tap, feature)
            if self.config.ppr:
                prototypes = self.ppr[i](feature, class_feature, *prototypes)
            elif i + 1 < len(taps):
                continue
            prompts = self.prompts(i + 1 if self.config.ppr else 1, feature, prototypes)
            logits, class_feature = self.decode(feature, *prompts)
        return {"bootstrap": bootstrap, "final": logits}


# Which tensors of a converted SAM this model starts from: path prefix here -> prefix there.
BASE_TENSORS = {
    "image_encoder": "image_encoder",
    "pe_layer": "prompt_encoder/pe_layer",
    "mask_decoder/transformer": "mask_decoder/transformer",
    "mask_decoder/upscaling": "mask_decoder/upscaling",
    "default_dense": "prompt_encoder/no_mask_embed",
}
# SAM's own prompts, mask tokens, hypernetworks and quality head have no place here: prompts come
# from prototypes, and there is one mask token and one hypernetwork per class.
BASE_UNUSED = (
    "prompt_encoder",
    "mask_decoder/iou_token",
    "mask_decoder/mask_tokens",
    "mask_decoder/hyper_mlps",
    "mask_decoder/iou_head",
)
