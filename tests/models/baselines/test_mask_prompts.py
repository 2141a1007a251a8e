"""Points and boxes made of masks, against SciPy's distances and morphology."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from pgpsam_jax.models.baselines import mask_prompts

SHAPES = [(24, 24), (17, 40), (31, 9)]


def blobs(shape, seed):
    """Masks (M, H, W): smooth blobs of all sizes, single pixels, lines, nothing but one hole."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((6, *shape)), (0, 2, 2))
    shares = np.linspace(0.3, 0.97, 6)
    masks = [one > np.quantile(one, share) for one, share in zip(noise, shares, strict=True)]
    line, pixel, hole = np.zeros((2, *shape), bool), np.zeros(shape, bool), np.ones(shape, bool)
    line[0, 3], line[1, :, 4:6] = True, True
    pixel[2, 5], hole[1, 2] = True, False
    return np.stack([*masks, *line, pixel, hole])


@pytest.mark.parametrize("shape", SHAPES)
def test_points_are_where_the_exact_distance_is_largest(shape):
    masks = blobs(shape, 0)
    squared = np.asarray(jax.jit(mask_prompts.squared_distances)(masks))
    points = np.asarray(jax.jit(mask_prompts.inner_points)(masks))
    for mask, found, (x, y) in zip(masks, squared, points.astype(int), strict=True):
        wanted = np.rint(ndimage.distance_transform_edt(mask) ** 2)
        np.testing.assert_array_equal(found, wanted)  # whole numbers: exactly
        assert mask[y, x] and (y, x) == np.unravel_index(wanted.argmax(), shape)


def test_a_mask_without_an_outside_is_equally_deep_everywhere():
    squared = np.asarray(mask_prompts.squared_distances(np.ones((1, 6, 9), bool)))
    assert np.ptp(squared) == 0 and squared.min() > 6**2 + 9**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("erosions", "dilations"), [(0, 0), (0, 2), (1, 0), (3, 5)])
def test_boxes_are_those_of_eroded_and_dilated_masks(shape, erosions, dilations):
    """By 5 x 5 squares, each takes or adds two pixels; what erosion leaves nothing of stays."""
    square, vanished = np.ones((5, 5), bool), 0
    masks = blobs(shape, 1)
    found = jax.jit(mask_prompts.bounding_boxes, static_argnames=("erosion", "growth"))(
        masks, erosion=2 * erosions, growth=2 * dilations
    )
    for mask, box in zip(masks, np.asarray(found), strict=True):
        kept = mask
        for _ in range(erosions):
            kept = ndimage.binary_erosion(kept, square, border_value=True)
        vanished += not kept.any()
        kept = kept if kept.any() else mask
        for _ in range(dilations):
            kept = ndimage.binary_dilation(kept, square)
        rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
        np.testing.assert_array_equal(box, [columns[0], rows[0], columns[-1], rows[-1]])
    assert bool(vanished) == bool(erosions)  # else half of the rule was not tried
