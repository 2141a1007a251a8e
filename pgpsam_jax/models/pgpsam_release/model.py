"""PGP-SAM, preset `release`: what the authors' code computes, at any size.

Letters: B batch, H W token grid, C channels, K classes with background, Q inter prototypes, S
stages. Source: docs/release_code.md; equal to the recorded outputs of that code tensor by tensor.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers, losses
from pgpsam_jax.models.pgpsam.model import Pass, PrototypeConfig, PrototypeSegmenter
from pgpsam_jax.models.pgpsam.ppr import Refined
from pgpsam_jax.models.pgpsam_release.cfm import ChannelSemantics, ContextualFeatureModulation
from pgpsam_jax.models.pgpsam_release.mask_decoder import MaskDecoder
from pgpsam_jax.models.pgpsam_release.ppg import PromptGenerator
from pgpsam_jax.models.pgpsam_release.ppr import PrototypeRefinement
from pgpsam_jax.models.segmenter import register


@dataclasses.dataclass(frozen=True)
class ReleaseConfig(PrototypeConfig):
    """dcn: `deformable`, the release's, or `plain`, dilated convolutions without gathers.

    token_order: how the decoder reads its image tokens before upscaling, see `TOKEN_ORDERS`.
    """

    dcn: str = "deformable"
    token_order: str = "released"


class PrePrompt(nnx.Module):
    """Modules of the pre-prompt pass: X_0 = CSM(neck + v), and its prompt generator."""

    def __init__(self, channels: int, classes: int, inter: int, *, dcn, dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.mask_embed = initializers.normal_param(rngs, 1, channels)
        self.csm = ChannelSemantics(channels, **common)
        self.ppg = PromptGenerator(channels, classes, inter, dcn=dcn, **common)


@register("pgpsam", "release")
class ReleasePgpSam(PrototypeSegmenter):
    """Images (B, rows, columns, 3) in [0, 1] to `bootstrap` and `final` logits (B, 4H, 4W, K).

    Of a converted SAM the release loads the encoder and the two-way transformer; the LayerNorms of
    the reordered blocks keep SAM's names and so land behind another sub-layer than in SAM.
    """

    label = "PGP-SAM, release"
    loss = staticmethod(losses.released_deep_supervision)
    base_tensors = {
        "image_encoder": "image_encoder",
        "mask_decoder/transformer": "mask_decoder/transformer",
    }
    base_unused = (
        "prompt_encoder",
        "mask_decoder/iou_token",
        "mask_decoder/mask_tokens",
        "mask_decoder/upscaling",
        "mask_decoder/hyper_mlps",
        "mask_decoder/iou_head",
    )
    sam_start = {r"(ppg/\d+|pre_prompt/ppg)/dense/mlp/lin2/bias": "prompt_encoder/no_mask_embed"}
    config_class = ReleaseConfig
    switches = ("dcn", "token_order")

    @classmethod
    def from_settings(cls, settings, num_classes: int, *, dtype, rngs: nnx.Rngs):
        if not (settings.cfm and settings.ppr and settings.ppg):
            raise UserError(
                "model.cfm, model.ppr and model.ppg switch off parts of preset paper, release has "
                "no such switches; set model.preset=paper or all three to True"
            )
        return super().from_settings(settings, num_classes, dtype=dtype, rngs=rngs)

    def __init__(self, config: ReleaseConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        encoder, c = config.sam.encoder, config.sam.decoder.width
        classes, inter, stages = config.num_classes, config.inter, len(config.stage_taps)
        common = dict(dtype=dtype, rngs=rngs)
        sizes = c, classes, inter
        self.image_encoder = encoder.make(config.lora, **common)
        self.mask_decoder = MaskDecoder(
            config.sam.decoder, classes, encoder.grid, token_order=config.token_order, **common
        )
        self.intra, self.intra_embed = (
            initializers.normal_param(rngs, classes, c) for _ in range(2)
        )
        self.inter, self.inter_embed = (initializers.normal_param(rngs, inter, c) for _ in range(2))
        self.pre_prompt = PrePrompt(*sizes, dcn=config.dcn, **common)
        self.cfm = nnx.List(
            ContextualFeatureModulation(encoder.tap_widths[tap], c, k=config.strip_kernel, **common)
            for tap in config.stage_taps
        )
        self.ppr = nnx.List(
            PrototypeRefinement(*sizes, config.k, encoder.grid, **common) for _ in range(stages)
        )
        self.ppg = nnx.List(
            PromptGenerator(*sizes, dcn=config.dcn, **common) for _ in range(stages)
        )
        self.image_level = initializers.normal_param(rngs, stages, c)
        self.class_level = initializers.normal_param(rngs, stages, classes)
        if config.start_scale is not None:
            self._scale_start(config.start_scale)
        self.config = config

    def _scale_start(self, factor: float) -> None:
        """Makes X_s nearly the neck, dense prompts nearly their last bias, sparse ones small."""
        for added in (self.pre_prompt.mask_embed, self.image_level):
            initializers.scale(added, factor)
        for cfm in self.cfm:
            for added in (cfm.norm.scale, cfm.merge.kernel, cfm.ffn.project_out.kernel):
                initializers.scale(added, factor)
        for generator in (self.pre_prompt.ppg, *self.ppg):
            initializers.scale(generator.dense.mlp.lin2.kernel, 0)
            initializers.scale(generator.sparse.mlp.lin2.kernel, factor)

    def embedded(self, refined: Refined) -> tuple[jax.Array, jax.Array]:
        """(intra, inter) with the additive tables, as every refinement and generator sees them."""
        return refined.intra + self.intra_embed[...], refined.inter + self.inter_embed[...]

    def decode_passes(self, encoded) -> list[Pass]:
        neck, taps = encoded
        raw = (self.intra[...], self.inter[...])
        refined = Refined(*(jnp.broadcast_to(p, (len(neck), *p.shape)) for p in raw))
        feature = self.pre_prompt.csm(neck + self.pre_prompt.mask_embed[...].astype(neck.dtype))
        sparse, dense = self.pre_prompt.ppg(feature, *self.embedded(refined))
        passes = [Pass(neck, *refined, sparse, dense, *self.mask_decoder(neck, sparse, dense))]
        for i, tap in enumerate(taps):
            low = layers.resize_bilinear(passes[-1].logits, feature.shape[1:3])
            probability = jax.nn.softmax(low, axis=-1)
            feature, up = self.cfm[i](tap, feature)
            feature = feature + self.image_level[i].astype(feature.dtype)
            class_feature = passes[-1].class_feature + self.class_level[i]
            prototypes = self.embedded(refined)
            refined = self.ppr[i](feature, class_feature, probability, *prototypes)
            sparse, dense = self.ppg[i](feature, *self.embedded(refined), probability)
            stage = up, class_feature, low, probability
            decoded = self.mask_decoder(feature, sparse, dense, stage)
            passes.append(Pass(feature, *refined, sparse, dense, *decoded))
        return passes
