"""`Segmenter`: what every method is to training and prediction; `register` gives it a name.

Letters: B batch, S image side, H W token grid, C channels, K classes with background.
"""

import enum
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import losses
from pgpsam_jax.models.layers import wide
from pgpsam_jax.models.sam.image_encoder import ImageEncoder
from pgpsam_jax.models.sam.lora import TARGETS, LoraConfig
from pgpsam_jax.models.sam.mask_decoder import MaskDecoder
from pgpsam_jax.models.sam.prompt_encoder import PromptEncoder
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.sam.tiny_vit import TinyVit
from pgpsam_jax.models.sam.weights import TrainedFor, check_encoder

CLASS_TOKENS = ("random", "sam")  # what the mask token of a class starts from
STARTS = ("auto", "sam", "random")  # how the modules that a method adds to SAM are initialized


class Training(enum.Enum):
    """How the parameters of a method are found."""

    SGD = "training"  # steps over batches, by the optimizer of `config.optim`
    LBFGS = "fit"  # one full-batch fit to the few-shot list
    NONE = "none"  # there are none


class Segmenter(nnx.Module):
    """Base class of the methods: maps images (B, S, S, 3) in [0, 1] to a dictionary of outputs.

    The outputs are what `loss` takes; `final`, if any, are logits (B, h, w, K) of any size. A
    subclass implements `encode` and `segment`, or `__call__`.

    Attributes:
      label: name in tables.
      loss: (outputs, labels (B, H, W), epoch, `StepConfig`) -> (scalar, metrics), see `losses`.
      training: how the parameters are found.
      base_tensors: path prefix of this model -> path prefix in a converted SAM that it is loaded
        from.
      base_unused: path prefixes of a converted SAM without a counterpart in this model.
      base_rows: path prefix in a converted SAM -> number of leading rows that are loaded.
      frozen: path prefixes outside the image encoder that are never trained.
      cnn_prefix: path prefix of the ResNet-18 that `model.cnn_base` initializes; "" without one.
      start: what `model.start=auto` means where there is a base, "sam" or "random".
      sam_start: regex of paths of this model -> path in a converted SAM, loaded besides
        `base_tensors` where the start is "sam".
      class_tokens: path prefix of this model -> path in a converted SAM: what a class has of mask
        tokens and hypernetworks on SAM's decoder, for `model.class_tokens=sam`.
      oracle: whether it is given the labels of the volumes that it is scored on.
    """

    label: str = ""
    loss: Callable = staticmethod(losses.deep_supervision)
    training: Training = Training.SGD
    base_tensors: Mapping[str, str] = {}
    base_unused: tuple[str, ...] = ()
    base_rows: Mapping[str, int] = {}
    frozen: tuple[str, ...] = ()
    cnn_prefix: str = ""
    start: str = "random"
    sam_start: Mapping[str, str] = {}
    class_tokens: Mapping[str, str] = {}
    oracle: bool = False
    image_encoder: ImageEncoder | TinyVit

    def __init__(self, *sizes: Any, dtype: Any, rngs: nnx.Rngs, **options: Any) -> None:
        """Takes what `from_settings` gives: by default a `SamConfig`, K and `options`."""
        raise NotImplementedError

    @classmethod
    def from_settings(cls, settings, num_classes: int, *, dtype, rngs: nnx.Rngs) -> "Segmenter":
        """Builds the model of `settings` (the fields of `config.model`) for K = num_classes."""
        options = cls.options(settings)
        return cls(cls.sam_config(settings), num_classes, **options, dtype=dtype, rngs=rngs)

    @classmethod
    def options(cls, settings) -> dict:
        """Returns the keyword arguments of the constructor that `settings` decides."""
        return {"lora": lora_config(settings)}

    @classmethod
    def sam_config(cls, settings) -> SamConfig:
        """Returns the sizes of the SAM of `settings`, which must be those of its base."""
        if settings.base:
            check_encoder(settings.base, settings.encoder, settings.patch_size)
        return SamConfig.preset(
            settings.encoder,
            settings.image_size,
            settings.patch_size,
            attention=settings.attention,
            remat=settings.remat,
            scan_blocks=settings.scan_blocks,
            colors=cls.resolve_colors(settings),
        )

    @classmethod
    def resolve_colors(cls, settings) -> str:
        """Returns `model.colors`, with `auto` resolved: the colors the base was trained on.

        Without a base the encoder is trained from scratch, on images in [0, 1].
        """
        if settings.colors != "auto":
            return settings.colors
        return TrainedFor.of(settings.base).colors if settings.base else "unit"

    @classmethod
    def resolve_start(cls, settings) -> str:
        """Returns `model.start`, "sam" or "random", with `auto` resolved to `start`."""
        if settings.start not in STARTS:
            raise UserError(f"model.start is {settings.start!r}; choose from {', '.join(STARTS)}")
        if settings.start != "auto":
            return settings.start
        return cls.start if settings.base else "random"

    @classmethod
    def resolve_start_scale(cls, settings) -> float | None:
        """Returns the factor on what is first added to SAM's features; None if that is random."""
        return settings.start_scale if cls.resolve_start(settings) == "sam" else None

    @classmethod
    def resolve_class_tokens(cls, settings) -> Mapping[str, str]:
        """Returns `class_tokens` if `model.class_tokens` is "sam", nothing if it is "random"."""
        if settings.class_tokens not in CLASS_TOKENS:
            raise UserError(
                f"model.class_tokens is {settings.class_tokens!r}; choose from "
                f"{', '.join(CLASS_TOKENS)}"
            )
        if settings.class_tokens == "random":
            return {}
        if not cls.class_tokens:
            raise UserError(
                f"model.class_tokens is 'sam', but {cls.label} has no mask token of a class on "
                "SAM's decoder; set it to random"
            )
        if not settings.base:
            raise UserError(
                "model.class_tokens is 'sam', but model.base is empty: there is no SAM to start "
                "from; set it to random, or name a base"
            )
        return cls.class_tokens

    def describe_attention(self, dtype) -> str:
        """Returns one line that names the attention kernels; refuses what cannot run here."""
        return self.image_encoder.config.describe_attention(dtype)

    def encode(self, images):
        """Returns the encoder's features, without random numbers: they may be cached."""
        raise NotImplementedError

    def segment(self, encoded, keys=None):
        """Returns the outputs for what `encode` returned; keys (B,) are given in training only."""
        raise NotImplementedError

    def __call__(self, images, keys=None):
        return self.segment(self.encode(images), keys)

    def predict(self, images):
        """Returns logits (B, h, w, K), of which the argmax is the class id."""
        return self(images)["final"]


# (config.model.name, config.model.preset) -> class; a method with one preset has "" there.
METHODS: dict[tuple[str, str], type[Segmenter]] = {}


def register(name: str, preset: str = ""):
    """Class decorator that makes a `Segmenter` the method `config.model.name` (and preset)."""

    def add(method: type[Segmenter]) -> type[Segmenter]:
        METHODS[name, preset] = method
        return method

    return add


def lora_config(settings) -> LoraConfig:
    """Returns the adapters of the encoder; of rank 0 unless `model.train_encoder` is "lora"."""
    if unknown := set(settings.lora_targets) - set(TARGETS):
        raise UserError(f"model.lora_targets {sorted(unknown)} unknown; choose from {TARGETS}")
    adapted = settings.train_encoder == "lora"
    return LoraConfig(settings.lora_rank if adapted else 0, tuple(settings.lora_targets))


# `Segmenter.class_tokens` of a method whose `mask_decoder` is SAM's with K masks.
OF_DECODER = {name: name for name in ("mask_decoder/mask_tokens", "mask_decoder/hyper_mlps")}


class SamSegmenter(Segmenter):
    """SAM's encoder and decoder, prompted by its no-mask embedding alone, one mask token per class.

    It has all of SAM's prompt encoder, as SAMed does: the rest of it gets no gradient. The quality
    head, one output per class here, starts at random, and so do mask tokens and hypernetworks
    unless `model.class_tokens` is "sam".
    """

    decoder = MaskDecoder
    base_tensors = {
        "image_encoder": "image_encoder",
        "prompt_encoder": "prompt_encoder",
        "mask_decoder/transformer": "mask_decoder/transformer",
        "mask_decoder/upscaling": "mask_decoder/upscaling",
        "mask_decoder/iou_token": "mask_decoder/iou_token",
    }
    class_tokens = OF_DECODER
    base_unused: tuple[str, ...] = (
        "mask_decoder/mask_tokens",
        "mask_decoder/hyper_mlps",
        "mask_decoder/iou_head",
    )

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
        self.image_encoder = sam.encoder.make(lora, **common)
        self.prompt_encoder = PromptEncoder(
            sam.decoder.width, sam.encoder.grid, sam.image_size, **common
        )
        self.mask_decoder = self.decoder(sam.decoder, masks, iou_head=iou_head, **common)

    def encode(self, images):
        return self.image_encoder(images)[0]

    def transform(self, feature, sparse=None, dense=None):
        """Returns mask tokens (B, M, C) and image tokens (B, H, W, C) of one pass of the decoder.

        sparse (B, T, C) and dense (B, H, W, C) prompts default to those of "no prompt".
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


def to_input(images):
    """Repeats gray slices (B, H, W) in [0, 1] as SAM's three channels, (B, H, W, 3)."""
    return jnp.repeat(images.astype(wide(images.dtype))[..., None], 3, axis=-1)
