"""Boxes to class ids, with a stand-in for SAM that answers with the box it was given."""

import nibabel as nib
import numpy as np
import pytest

from pgpsam_jax.data.boxes import SliceBox, boxes_around
from pgpsam_jax.data.io.nifti import from_nibabel
from pgpsam_jax.data.preprocessing import Preprocessing
from pgpsam_jax.inference.box_prompts import BoxPredictor, widened
from tests.support.echo_sam import Echo

WINDOW = Preprocessing(32, (0.0, 10.0))


def volume_of(shape, seed=0):
    array = np.random.default_rng(seed).uniform(0, 10, shape).astype(np.float32)
    return from_nibabel(nib.Nifti1Image(array, np.eye(4)))


def predictor(boxes, truth=None, classes=3, **options):
    sam = Echo()
    return BoxPredictor(sam, WINDOW, lambda _: (boxes, truth), num_classes=classes, **options), sam


def rectangles(shape):
    """Class ids of two rectangles in some slices: each is its own box."""
    truth = np.zeros(shape, np.uint8)
    truth[1, 1:4, 2:5] = 1
    truth[1, 4:6, 5:8] = 2
    truth[2, 0:2, 0:3] = 2
    return truth


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_as_they_are_give_the_truth(mirrored):
    volume = volume_of((9, 7, 4))
    truth = rectangles(volume.array.shape)
    model, sam = predictor(boxes_around(truth), truth, mirrored=mirrored)
    assert np.array_equal(model(volume), truth)
    assert np.array_equal(*model.dice.values(), np.ones((2, 2)))
    assert len(sam.asked) == 2  # slices without a box are not shown


def test_mirrored_shows_the_mirror_image():
    volume = volume_of((9, 7, 4))
    truth = rectangles(volume.array.shape)
    (plain, sam), (turned, other) = (
        predictor(boxes_around(truth), mirrored=mirrored, widening=0.5)
        for mirrored in (False, True)
    )
    assert np.array_equal(plain(volume), turned(volume)) and not plain.dice
    np.testing.assert_array_equal(other.image, sam.image[:, ::-1])
    for box, mirror in zip(sam.asked, other.asked, strict=True):
        np.testing.assert_allclose(mirror, [9, 0, 9, 0] + box[:, [2, 1, 0, 3]] * [-1, 1, -1, 1])


def test_dice_of_masks_that_overlap():
    """A mask counts whole on its own; of the written ids, the higher logit has the pixel."""
    volume = volume_of((4, 4, 1))
    truth = np.zeros((1, 4, 4), np.uint8)
    truth[0, :2], truth[0, 2:] = 1, 2
    boxes = {0: [SliceBox(1, (0, 0, 4, 3)), SliceBox(2, (0, 2, 4, 4))]}
    model, _ = predictor(boxes, truth)
    ids = model(volume)
    expected = np.repeat([1, 1, 2, 2], 4).reshape(1, 4, 4)  # the smaller box is surer
    assert np.array_equal(ids, expected)
    ((own, on_top),) = model.dice.values()
    np.testing.assert_allclose(own, [2 * 8 / (12 + 8), 1])
    np.testing.assert_allclose(on_top, [1, 1])


def test_several_boxes_of_a_label_are_united_and_missing_ones_are_missed():
    volume, truth = volume_of((6, 6, 2)), np.zeros((2, 6, 6), np.uint8)
    truth[0, 0, 0] = truth[0, 5, 5] = 1
    truth[1, 2:4, 2:4] = 3
    boxes = {0: [SliceBox(1, (0, 0, 1, 1)), SliceBox(1, (5, 5, 6, 6))]}
    model, _ = predictor(boxes, truth, classes=4)
    assert np.array_equal(model(volume), np.where(truth == 1, truth, 0))
    np.testing.assert_array_equal(*model.dice.values(), [[1, np.nan, 0]] * 2)


def test_widening_stops_at_the_border():
    boxes = [SliceBox(1, (0, 2, 3, 4)), SliceBox(2, (5, 5, 9, 8))]
    expected = [[0, 0.5, 4.5, 5.5], [3.5, 3.5, 9, 8]]
    np.testing.assert_array_equal(widened(boxes, 1.5, (8, 9)), expected)
