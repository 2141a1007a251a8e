"""SurgicalSAM: prompts for SAM's decoder from one learned prototype per class (Yue et al. 2024).

Letters: B batch, H W token grid, L = H * W, C channels, T prompt tokens of a class, K classes with
background, M = K - 1 prototypes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pgpsam_jax.errors import UserError
from pgpsam_jax.models import initializers, layers, losses
from pgpsam_jax.models.baselines.prompted_sam import PromptedSam, with_background
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import register

_HIDDEN = 128


class Prompter(nnx.Module):
    """Similarity of features and prototypes to the prompts of every class."""

    def __init__(self, channels: int, grid: tuple[int, int], tokens: int, *, dtype, rngs):
        common = dict(dtype=dtype, rngs=rngs)
        self.dense1 = layers.Linear(channels, _HIDDEN, **common)
        self.dense2 = layers.Linear(_HIDDEN, channels, **common)
        self.sparse1 = layers.Linear(grid[0] * grid[1], _HIDDEN, **common)  # over positions
        self.sparse2 = layers.Linear(_HIDDEN, tokens, **common)

    def __call__(self, feature, prototypes):
        """Dense (B, M, H, W, C) and sparse (B, M, T, C), for feature (B, H, W, C)."""
        similar = layers.wide_einsum("bhwc,mc->bmhw", feature, prototypes.astype(feature.dtype))
        activated = feature[:, None] * (1 + similar[..., None]).astype(feature.dtype)
        dense = self.dense2(jax.nn.relu(self.dense1(activated)))
        b, m, h, w, c = activated.shape
        positions_last = activated.reshape(b, m, h * w, c).swapaxes(2, 3)
        sparse = self.sparse2(jax.nn.relu(self.sparse1(positions_last)))
        return dense, sparse.swapaxes(2, 3)


@register("surgicalsam")
class SurgicalSam(PromptedSam):
    """Images (B, S, S, 3) to `final` logits (B, 4H, 4W, K), background 0; every class is prompted.

    Trains prototypes, prompter and decoder. A class is prompted by its own dense prompt and the
    sparse ones of all classes, its own marked as points inside, the others' as outside. It is not
    given which classes an image shows. The loss also takes `features` and `prototypes`.
    start_scale: see `pgpsam.model.PrototypeConfig`.
    """

    label = "SurgicalSAM"
    loss = staticmethod(losses.prototype_prompts)
    sam_start = {"prompter/dense2/bias": "prompt_encoder/no_mask_embed"}  # as in PGP-SAM

    @classmethod
    def options(cls, settings):
        if settings.prompt_tokens < 1:
            raise UserError(f"model.prompt_tokens is {settings.prompt_tokens}; give 1 or more")
        own = dict(
            prompt_tokens=settings.prompt_tokens, start_scale=cls.resolve_start_scale(settings)
        )
        return super().options(settings) | own

    def __init__(
        self,
        sam: SamConfig,
        num_classes: int,
        *,
        prompt_tokens: int = 4,
        start_scale: float | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        super().__init__(sam, dtype=dtype, rngs=rngs, **options)
        width = sam.decoder.width
        self.prototypes = initializers.normal_param(rngs, num_classes - 1, width)
        self.prompter = Prompter(width, sam.encoder.grid, prompt_tokens, dtype=dtype, rngs=rngs)
        if start_scale is not None:
            initializers.scale(self.prompter.dense2.kernel, 0)
            initializers.scale(self.prompter.sparse2.kernel, start_scale)

    def segment(self, feature, keys=None):
        prototypes = self.prototypes[...]
        dense, sparse = self.prompter(feature, prototypes)
        logits = self.ask(feature, self._marked(sparse), dense)
        return {"final": with_background(logits), "features": feature, "prototypes": prototypes}

    def _marked(self, sparse):
        """(B, M, T, C) tokens of each class to (B, M, M * T, C), those of all for each asked."""
        b, m, t, c = sparse.shape
        outside, inside = self.prompt_encoder.point_embeddings[...][:2]
        marks = jnp.where(jnp.eye(m, dtype=bool)[..., None], inside, outside)  # asked, of, C
        tokens = sparse[:, None] + marks[:, :, None].astype(sparse.dtype)
        return tokens.reshape(b, m, m * t, c)
