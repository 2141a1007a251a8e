"""FSSP-SAM: a linear classifier of SAM's features makes the prompts for SAM (Wu et al. 2023).

Letters: B batch, S image side, H W token grid, C channels, K classes with background.
"Self-prompting large vision models for few-shot medical image segmentation"; the original knows
one organ, here each class has its own classifier against all others.
"""

import jax.numpy as jnp
import numpy as np

from pgpsam_jax.models import layers, losses
from pgpsam_jax.models.baselines.prompted_sam import MaskPromptedSam, check_prompt
from pgpsam_jax.models.sam.sam import SamConfig
from pgpsam_jax.models.segmenter import Training, register

# In sides of a token, 16 px in the original: three erosions and five dilations by 5 x 5 pixels take
# off 6 and add 10; the box then grows by 0 to 19 px at random on every side, here by their mean.
EROSION, DILATION, GROWTH = 6 / 16, 10 / 16, 9.5 / 16


@register("fssp")
class Fssp(MaskPromptedSam):
    """Images (B, S, S, 3) to `coarse` logits (B, H, W, K - 1), whose classifier alone trains.

    A rough mask are the tokens of a class whose logit is above 0. prompt: "point", the pixel
    deepest inside it, "box" about it, or "both".
    """

    label = "FSSP-SAM"
    loss = staticmethod(losses.one_against_rest)
    training = Training.LBFGS

    def __init__(self, sam: SamConfig, num_classes: int, *, prompt: str, rngs, **options):
        self.prompt = check_prompt(prompt)
        super().__init__(sam, rngs=rngs, **options)
        self.classifier = layers.Linear(
            sam.decoder.width, num_classes - 1, init=_zeros, dtype=jnp.float32, rngs=rngs
        )

    def segment(self, feature, keys=None):
        return {"coarse": self.classifier(feature), "kernel": self.classifier.kernel[...]}

    def predict(self, images):
        """Logits (B, 4H, 4W, K); a class without a rough mask gets none."""
        feature = self.encode(images)
        side = images.shape[1] // feature.shape[1]
        rough = self.segment(feature)["coarse"] > 0
        rough = jnp.repeat(jnp.repeat(rough, side, axis=1), side, axis=2)
        return self.ask_by_masks(
            feature,
            rough,
            self.prompt,
            erosion=round(EROSION * side),
            growth=round((DILATION + GROWTH) * side),
        )


def _zeros(rngs, shape):
    return np.zeros(shape, np.float32)
