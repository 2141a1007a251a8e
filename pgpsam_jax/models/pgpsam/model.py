"""PGP-SAM, preset `paper`: prompts from prototypes, a bootstrap pass and refinement stages.

Letters: B batch, H W token grid, C channels, K classes with background, Q inter prototypes.
Source: Yan et al., PGP-SAM (2025), sections 2.1-2.3; equations live in cfm.py, ppr.py, ppg.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers
from pgpsam_jax.models.pgpsam.cfm import ContextualFeatureModulation
from pgpsam_jax.models.pgpsam.ppg import PromptGenerator
from pgpsam_jax.models.pgpsam.ppr import PrototypeRefinement, Refined
from pgpsam_jax.models.sam.lora import LoraConfig
from pgpsam_jax.models.sam.mask_decoder import MaskDecoder, class_features
from pgpsam_jax.models.sam.prompt_encoder import FourierPositions
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import OF_DECODER, Segmenter, lora_config, register


@dataclasses.dataclass(frozen=True)
class PrototypeConfig:
    """Sizes that every preset has; one refinement stage per entry of `stage_taps` (block indices).

    alpha: inter prototypes per class; k: those matched to each class. Empty `stage_taps` means the
    paper's two: the last and the first global-attention block of the encoder. start_scale: factor
    on what is first added to SAM's features; None leaves the initialization as it is.
    """

    sam: SamConfig
    num_classes: int
    stage_taps: tuple[int, ...] = ()
    alpha: int = 8
    k: int = 4
    strip_kernel: int = 5
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    start_scale: float | None = None

    def __post_init__(self):
        encoder = self.sam.encoder
        if not self.stage_taps:
            object.__setattr__(self, "stage_taps", encoder.default_taps)
        if any(not 0 <= tap < len(encoder.tap_widths) for tap in self.stage_taps):
            raise UserError(
                f"stage_taps {self.stage_taps} must be indices from 0 to "
                f"{len(encoder.tap_widths) - 1}"
            )
        if self.num_classes < 2:
            raise UserError(f"num_classes is {self.num_classes}; the background and one more")
        if self.strip_kernel < 1 or self.strip_kernel % 2 == 0:
            raise UserError(
                f"strip_kernel is {self.strip_kernel}; it must be odd, to have a middle"
            )
        if not 1 <= self.k <= self.inter:
            raise UserError(
                f"k={self.k} inter prototypes per class must lie between 1 and alpha * classes "
                f"= {self.inter}"
            )

    @property
    def inter(self) -> int:
        """Number of inter prototypes, Q = alpha K."""
        return self.alpha * self.num_classes


@dataclasses.dataclass(frozen=True)
class PgpSamConfig(PrototypeConfig):
    """Preset `paper`: with the switches of Table 3.

    mix_start: initial value of the learned alpha and beta of Eq 5; ppr_norm: LayerNorm on P^
    and F^ there.
    """

    mix_start: float = 0.5
    ppr_norm: bool = True
    cfm: bool = True
    ppr: bool = True
    ppg: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.ppr and not self.ppg:
            raise UserError(
                "model.ppr refines prototypes that only model.ppg uses; switch both on or ppr off"
            )


class Pass(NamedTuple):
    """One pass of the decoder: what went in, how it came about, what came out.

    feature (B, H, W, C) is X_i; intra (B, K, C) and inter (B, Q, C) are the prototypes that sparse
    (B, K, C) and dense (B, H, W, C) prompts were made of; logits (B, 4H, 4W, K); class_feature
    F_M (B, H, W, K). How PPR refined the prototypes, if it did in this pass: picks (B, K, k) of
    the pass before's inter prototypes, W_c and W_q (B, n, L), see `ppr.Refined`. None where a
    switch is off.
    """

    feature: jax.Array
    intra: jax.Array | None
    inter: jax.Array | None
    picks: jax.Array | None
    class_weights: jax.Array | None
    query_weights: jax.Array | None
    sparse: jax.Array
    dense: jax.Array
    logits: jax.Array
    class_feature: jax.Array


class PrototypeSegmenter(Segmenter):
    """Base of the presets; `switches` are the fields of `config_class` that are its own."""

    config_class = PrototypeConfig
    config: Any  # of `config_class`
    switches: tuple[str, ...] = ()

    @classmethod
    def from_settings(cls, settings, num_classes: int, *, dtype, rngs: nnx.Rngs):
        config = cls.config_class(
            sam=cls.sam_config(settings),
            num_classes=num_classes,
            stage_taps=tuple(settings.stage_taps),
            alpha=settings.alpha,
            k=settings.k,
            lora=lora_config(settings),
            start_scale=cls.resolve_start_scale(settings),
            **{name: getattr(settings, name) for name in cls.switches},
        )
        return cls(config, dtype=dtype, rngs=rngs)

    def encode(self, images):
        """Returns the neck's feature (B, H, W, C) and the tokens of the tapped blocks."""
        return self.image_encoder(images, self.config.stage_taps)

    def segment(self, encoded, keys=None):
        passes = self.decode_passes(encoded)
        return {"bootstrap": passes[0].logits, "final": passes[-1].logits}

    def passes(self, images) -> list[Pass]:
        """Returns every pass of the decoder, the bootstrap first, with its inputs."""
        return self.decode_passes(self.encode(images))

    def decode_passes(self, encoded) -> list[Pass]:
        """Returns the passes for what `encode` returned."""
        raise NotImplementedError


@register("pgpsam", "paper")
class PgpSam(PrototypeSegmenter):
    """Images (B, rows, columns, 3) in [0, 1] to `bootstrap` and `final` logits (B, 4H, 4W, K).

    SAM's own prompts, mask tokens, hypernetworks and quality head have no place here: prompts come
    from prototypes, and there is one mask token and one hypernetwork per class.
    """

    label = "PGP-SAM, paper"
    base_tensors = {
        "image_encoder": "image_encoder",
        "pe_layer": "prompt_encoder/pe_layer",
        "mask_decoder/transformer": "mask_decoder/transformer",
        "mask_decoder/upscaling": "mask_decoder/upscaling",
        "default_dense": "prompt_encoder/no_mask_embed",
    }
    base_unused = (
        "prompt_encoder",
        "mask_decoder/iou_token",
        "mask_decoder/mask_tokens",
        "mask_decoder/hyper_mlps",
        "mask_decoder/iou_head",
    )
    start = "sam"
    sam_start = {r"ppg/\d+/dense/mlp/lin2/bias": "prompt_encoder/no_mask_embed"}
    class_tokens = OF_DECODER
    config_class = PgpSamConfig
    switches = ("mix_start", "ppr_norm", "cfm", "ppr", "ppg")

    def __init__(self, config: PgpSamConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        encoder, c = config.sam.encoder, config.sam.decoder.width
        classes, inter = config.num_classes, config.inter
        # A middle pass only gives PPR its class feature; without PPR its prompts would be dead.
        passes = 1 + (len(config.stage_taps) if config.ppr else 1)
        common = dict(dtype=dtype, rngs=rngs)
        self.image_encoder = encoder.make(config.lora, **common)
        self.pe_layer = FourierPositions(c, rngs=rngs)
        self.mask_decoder = MaskDecoder(config.sam.decoder, classes, iou_head=False, **common)
        self.cfm = nnx.List(
            ContextualFeatureModulation(
                encoder.tap_widths[tap], c, k=config.strip_kernel, enabled=config.cfm, **common
            )
            for tap in config.stage_taps
        )
        if config.ppg:
            self.intra = initializers.normal_param(rngs, classes, c)
            self.inter = initializers.normal_param(rngs, inter, c)
            self.ppg = nnx.List(  # the bootstrap's, then one per later pass
                PromptGenerator(c, classes, inter, **common) for _ in range(passes)
            )
        else:
            self.default_dense = initializers.normal_param(rngs, c)
        if config.ppr:
            self.ppr = nnx.List(
                PrototypeRefinement(
                    c,
                    classes,
                    config.k,
                    encoder.grid,
                    mix_start=config.mix_start,
                    norm=config.ppr_norm,
                    **common,
                )
                for _ in config.stage_taps
            )
        if config.start_scale is not None:
            for module in (*self.cfm, *(self.ppg if config.ppg else ())):
                module.scale_start(config.start_scale)
        self.config = config

    def prompts(self, i: int, feature, refined: Refined | None):
        """Sparse (B, K or 0, C) and dense (B, H, W, C) prompts of pass i (0 is the bootstrap)."""
        if refined is not None:
            return self.ppg[i](feature, refined.intra, refined.inter)
        dense = jnp.broadcast_to(self.default_dense[...].astype(feature.dtype), feature.shape)
        return jnp.zeros((feature.shape[0], 0, feature.shape[-1]), feature.dtype), dense

    def decode(self, feature, sparse, dense, **masks):
        """One pass of the shared decoder: logits (B, 4H, 4W, K) and F_M (B, H, W, K)."""
        positions = self.pe_layer.grid(self.config.sam.encoder.grid).astype(feature.dtype)
        mask_tokens, image_tokens, _ = self.mask_decoder.run(feature, positions, sparse, dense)
        logits = self.mask_decoder.masks(mask_tokens, image_tokens, **masks)
        return logits, class_features(mask_tokens, image_tokens)

    def decode_passes(self, encoded, **masks) -> list[Pass]:
        """As the base; masks: options of the decoder's masks."""
        feature, taps = encoded
        refined = None
        if self.config.ppg:
            raw = (self.intra[...], self.inter[...])
            refined = Refined(*(jnp.broadcast_to(p, (len(feature), *p.shape)) for p in raw))
        passes = [self._pass(0, feature, refined, **masks)]
        for i, tap in enumerate(taps):
            feature = self.cfm[i](tap, feature)
            if refined is not None and self.config.ppr:
                last = passes[-1].class_feature
                refined = self.ppr[i](feature, last, refined.intra, refined.inter)
            elif i + 1 < len(taps):
                continue
            passes.append(self._pass(len(passes), feature, refined, **masks))
        return passes

    def _pass(self, i: int, feature, refined: Refined | None, **masks) -> Pass:
        sparse, dense = self.prompts(i, feature, refined)
        decoded = self.decode(feature, sparse, dense, **masks)
        if refined is None:
            return Pass(feature, None, None, None, None, None, sparse, dense, *decoded)
        return Pass(feature, *refined, sparse, dense, *decoded)
