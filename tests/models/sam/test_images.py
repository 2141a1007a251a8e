"""What happens to images before SAM and to its masks after it, as the official code does it."""

import numpy as np
import pytest
from PIL import Image

from pgpsam_jax.models.sam.image_encoder import PIXEL_MEAN, PIXEL_STD
from pgpsam_jax.models.sam.sam import postprocess, preprocess
from tests.reference.sam_torch import draw, first, last, relative
from tests.support.optional import F, torch

TIGHT = 2e-6
# (image, target): shrink, enlarge, one axis already right, and a target that is not square.
IMAGES = [((90, 131), 64), ((40, 21), 64), ((64, 50), 64), ((50, 90), (64, 96))]


def official_shape(image, target):
    scale = target / max(image)
    return int(image[0] * scale + 0.5), int(image[1] * scale + 0.5)


@pytest.mark.parametrize(("shape", "target"), IMAGES)
def test_preprocess_is_the_official_one(shape, target):
    """Longest side scaled with antialias, then mean and std, then zeros below and to the right.

    The official code resizes tensors so, and 8-bit images alike but rounded to gray levels.
    """
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    size = (target, target) if isinstance(target, int) else target
    got, resized = preprocess(image.astype(np.float32), size)
    if isinstance(target, int):
        assert resized == official_shape(shape, target)
    x = F.interpolate(first(image[None]).float(), resized, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))

    def official(x):
        return last(F.pad((x - mean) / std, (0, size[1] - resized[1], 0, size[0] - resized[0])))

    assert relative(got, official(x)) <= TIGHT
    unit, _ = preprocess(image.astype(np.float32), size, "unit")
    assert relative(unit[:, : resized[0], : resized[1]], last(x) / 255) <= TIGHT

    pil = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR))
    assert abs(pil - last(x)).max() <= 1.01
    rounded, _ = preprocess(image, size)
    assert relative(rounded, official(first(pil[None]).float())) <= TIGHT


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
