"""SAM prompted for one mask per class: what the methods that prompt it share.

Letters: B batch, S image side, H W token grid, C channels, T tokens, K classes with background, M
prompts per image, one for each foreground class (M = K - 1).
"""

import jax.numpy as jnp

from pgpsam_jax.errors import UserError
from pgpsam_jax.models.baselines.mask_prompts import bounding_boxes, inner_points
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import SamSegmenter

PROMPTS = ("point", "box", "both")
NO_MASK = -1e4  # logit of a class without a prompt


class PromptedSam(SamSegmenter):
    """SAM with its own four mask tokens; the first is the mask of an unambiguous prompt."""

    base_tensors = {name: name for name in ("image_encoder", "prompt_encoder", "mask_decoder")}
    base_unused = ()
    class_tokens = {}  # SAM's own
    frozen: tuple[str, ...] = ("prompt_encoder",)

    def __init__(self, sam: SamConfig, **options):
        super().__init__(sam, 4, **options)

    def ask(self, feature, sparse, dense):
        """Logits (B, 4H, 4W, M): features (B, H, W, C), prompts (B, M, T, C), (B, M, H, W, C)."""
        b, m = sparse.shape[:2]

        def folded(x):  # prompts as rows of the batch
            return x.reshape(b * m, *x.shape[2:]).astype(feature.dtype)

        image = folded(jnp.broadcast_to(feature[:, None], (b, m, *feature.shape[1:])))
        positions = self.prompt_encoder.pe_layer.grid(self.prompt_encoder.grid)
        logits, _ = self.mask_decoder(
            image, positions.astype(feature.dtype), folded(sparse), folded(dense), multimask=False
        )
        return jnp.moveaxis(logits.reshape(b, m, *logits.shape[1:3]), 1, -1)

    def ask_by_masks(self, feature, masks, prompt: str, *, erosion: int = 0, growth: int = 0):
        """Logits (B, 4H, 4W, K) for the prompts of rough masks (B, S, S, M), background 0.

        prompt: one of `PROMPTS`. erosion, growth: see `bounding_boxes`. A class with an empty mask
        is predicted nowhere.
        """
        b, h, w, m = masks.shape
        each = jnp.moveaxis(masks, -1, 1).reshape(b * m, h, w)
        given = {}
        if prompt != "box":
            given["points"] = inner_points(each)[:, None]
            given["labels"] = jnp.ones((b * m, 1), jnp.int32)
        if prompt != "point":
            given["boxes"] = bounding_boxes(each, erosion=erosion, growth=growth)
        sparse, dense = (x.reshape(b, m, *x.shape[1:]) for x in self.prompt_encoder(**given))
        there = jnp.any(masks, axis=(1, 2), keepdims=True)
        return with_background(jnp.where(there, self.ask(feature, sparse, dense), NO_MASK))


class MaskPromptedSam(PromptedSam):
    """SAM unchanged, prompted by a mask per class: `prompt` is one of `PROMPTS`."""

    frozen = ("prompt_encoder", "mask_decoder")

    @classmethod
    def options(cls, settings):
        if settings.train_encoder == "full":
            raise UserError(
                f"method {settings.name} does not train SAM's encoder; set "
                "model.train_encoder=frozen"
            )
        return {"prompt": settings.prompt}


def with_background(logits):
    """Adds the background's logit 0 to logits (..., M) of foreground classes: (..., K)."""
    return jnp.concatenate([jnp.zeros_like(logits[..., :1]), logits], axis=-1)


def check_prompt(prompt: str) -> str:
    """One of `PROMPTS`, or a `UserError`."""
    if prompt not in PROMPTS:
        raise UserError(f"model.prompt is {prompt!r}; choose from {', '.join(PROMPTS)}")
    return prompt
