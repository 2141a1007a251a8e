"""A stand-in for `SamPredictor` that answers with the boxes it is given."""

import numpy as np

from pgpsam_jax.inference.sam_predictor import SamMasks


class Echo:
    """Logits inside a box are the pixel's intensity plus 1 over the box's area, else -1."""

    image_size = (32, 32)

    def __init__(self):
        self.asked = []

    def set_image(self, image):
        self.image = image

    def predict(self, *, box, multimask, return_logits):
        assert return_logits and not multimask
        self.asked.append(np.array(box))
        y, x = (np.arange(n) + 0.5 for n in self.image.shape)
        logits = []
        for x0, y0, x1, y1 in box:
            inside = ((y >= y0) & (y <= y1))[:, None] & (x >= x0) & (x <= x1)
            logits.append(np.where(inside, self.image + 1 / (1 + (x1 - x0) * (y1 - y0)), -1))
        return SamMasks(np.stack(logits)[:, None], None, None)
