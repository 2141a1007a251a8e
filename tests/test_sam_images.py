"""What happens to images before SAM and to its masks after it, as the official code does it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sam_torch import draw, first, last, relative

from pgpsam_jax.models.sam.image_encoder import PIXEL_MEAN, PIXEL_STD
from pgpsam_jax.models.sam.sam import postprocess, preprocess

TIGHT = 2e-6
# (image, target): shrink, enlarge, one axis already right, and a target that is not square.
IMAGES = [((90, 131), 64), ((40, 21), 64), ((64, 50), 64), ((50, 90), (64, 96))]


def official_shape(image, target):
    scale = target / max(image)
    return int(image[0] * scale + 0.5), int(image[1] * scale + 0.5)


@pytest.mark.parametrize(("shape", "target"), IMAGES)
def test_preprocess_is_the_official_one(shape, target):
    """Longest side scaled with antialias, then mean and std, then zeros below and to the right.

    The official code resizes tensors so, and 8-bit images alike but rounded to grey levels.
    """
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    size = (target, target) if isinstance(target, int) else target
    got, resized = preprocess(image, size)
    if isinstance(target, int):
        assert resized == official_shape(shape, target)
    x = F.interpolate(first(image[None]).float(), resized, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    x = F.pad((x - mean) / std, (0, size[1] - resized[1], 0, size[0] - resized[0]))
    assert relative(got, last(x)) <= TIGHT

    pil = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR))
    grey = got[0, : resized[0], : resized[1]] * np.array(PIXEL_STD) + np.array(PIXEL_MEAN)
    assert abs(grey - pil).max() <= 1.01


@pytest.mark.parametrize(("shape", "target"), IMAGES)
def test_postprocess_is_the_official_one(shape, target):
    """To the input size, without the padding, to the original size; never antialiased."""
    size = (target, target) if isinstance(target, int) else target
    _, resized = preprocess(np.zeros((*shape, 3), np.uint8), size)
    logits = draw(2, size[0] // 4, size[1] // 4, 3)
    x = F.interpolate(first(logits), size, mode="bilinear", align_corners=False)
    x = x[..., : resized[0], : resized[1]]
    x = F.interpolate(x, shape, mode="bilinear", align_corners=False)
    assert relative(postprocess(logits, size, resized, shape), last(x)) <= TIGHT
