"""SAMed: LoRA on SAM's encoder, no prompt, one mask token a class (Zhang and Liu 2023).

Letters: B batch, H W token grid, C channels, K classes with background.
"""

from pgpsam_jax.models import losses
from pgpsam_jax.models.segmenter import SamSegmenter, register


@register("samed")
class Samed(SamSegmenter):
    """Images (B, S, S, 3) to `final` logits (B, 4H, 4W, K); trains LoRA, decoder, embedding."""

    label = "SAMed"
    loss = staticmethod(losses.final_only)

    def segment(self, feature, keys=None):
        return {"final": self.mask_decoder.masks(*self.transform(feature))}
