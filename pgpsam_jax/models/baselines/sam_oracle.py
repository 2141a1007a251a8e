"""SAM prompted by the true masks: an upper bound for methods that find their prompts.

Not a method, since it needs the labels it is scored with; tables mark its row.
Letters: B batch, S image side, H W token grid, K classes with background.
"""

import jax.numpy as jnp

from pgpsam_jax.models.baselines.prompted_sam import MaskPromptedSam, check_prompt
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import Training, register


@register("sam")
class OracleSam(MaskPromptedSam):
    """Images and labels to logits; nothing trains.

    prompt: "point", the pixel deepest inside the true mask of a class; "box", its bounding box;
    "both".
    """

    label = "SAM, true boxes (ORACLE)"
    training = Training.NONE
    oracle = True

    def __init__(self, sam: SamConfig, num_classes: int, *, prompt: str, **options):
        self.classes, self.prompt = num_classes, check_prompt(prompt)
        super().__init__(sam, **options)

    def predict(self, images, labels):  # type: ignore[override]  # `oracle` tells callers
        """Logits (B, 4H, 4W, K) for images (B, S, S, 3) and their true class ids (B, S, S)."""
        masks = labels[..., None] == jnp.arange(1, self.classes)
        return self.ask_by_masks(self.encode(images), masks, self.prompt)
