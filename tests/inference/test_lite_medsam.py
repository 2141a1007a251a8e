"""LiteMedSAM with its own weights: the recorded outputs of the authors' model, and a real CT."""

import numpy as np
import pytest

import pgpsam_jax
from pgpsam_jax.data.io.volumes import read_image, read_label
from pgpsam_jax.data.layouts.label_table import load_label_table
from tests.support.places import REPOSITORY, shared, weights

pytestmark = pytest.mark.golden
# Dice over the volume that the authors' model reaches with boxes of the truth, a pixel wider.
DICE = {
    "spleen": 0.962,
    "right_kidney": 0.927,
    "left_kidney": 0.934,
    "gallbladder": 0.941,
    "liver": 0.923,
    "stomach": 0.942,
    "aorta": 0.928,
    "pancreas": 0.677,
}


def error(found, expected) -> float:
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def recorded():
    return np.load(shared("golden/lite_medsam.npz"))


@pytest.fixture(scope="module")
def predictor():
    return pgpsam_jax.SamPredictor.from_pretrained(weights("lite_medsam"))


def test_embedding_and_masks_are_the_recorded_ones(predictor, recorded):
    """Measured on CPU: embeddings 2.9e-6, logits 3.0e-6, IoU 6e-7."""
    for i, image in enumerate(recorded["images"]):
        predictor.set_image(image)
        embedding = np.moveaxis(predictor.embedding, -1, 1)
        assert error(embedding, recorded["embedding"][i : i + 1]) <= 1e-5
        for multimask in (False, True):
            name = f"multi{int(multimask)}"
            masks = predictor.predict(box=recorded["boxes"][i], multimask=multimask)
            logits = masks.low_res_logits[..., ::2, ::2]
            assert error(logits, recorded[f"{name}.logits"][i]) <= 1e-4
            assert np.abs(masks.scores - recorded[f"{name}.iou"][i]).max() <= 1e-5


def test_another_size_with_the_same_weights(recorded):
    small = pgpsam_jax.SamPredictor.from_pretrained(weights("lite_medsam"), image_size=128)
    for image, expected in zip(recorded["images128"], recorded["embedding128"], strict=True):
        small.set_image(image)
        assert error(np.moveaxis(small.embedding, -1, 1), expected[None]) <= 1e-5


def test_boxes_on_a_real_ct(predictor):
    """Turned as it was recorded: x grows to the right, so left and right are not mirrored."""
    table = load_label_table(REPOSITORY / "configs" / "labels" / "abdomen_ct.json")
    volume = read_image(shared("data/abdomen_ct/ct.nii.gz")).array[..., ::-1]
    label = read_label(shared("data/abdomen_ct/seg104.nii.gz")).array
    truth = table.remap(label, "seg104")[..., ::-1]
    overlap, sizes = np.zeros(9), np.zeros(9)
    for image, ids in zip(np.clip(volume, -160, 240), truth, strict=True):
        organs = [organ for organ in range(1, 9) if (ids == organ).any()]
        if not organs:
            continue
        predictor.set_image((image - image.min()) / (image.max() - image.min()))
        boxes = [box_of(ids == organ) for organ in organs]
        boxes += boxes[:1] * (8 - len(boxes))  # one number of boxes: one compiled program
        masks = predictor.predict(box=boxes, multimask=False).masks[:, 0]
        for organ, mask in zip(organs, masks, strict=False):
            overlap[organ] += (mask & (ids == organ)).sum()
            sizes[organ] += mask.sum() + (ids == organ).sum()
    found = dict(zip(table.names[1:], 2 * overlap[1:] / sizes[1:], strict=True))
    assert found == pytest.approx(DICE, abs=0.005)


def box_of(mask: np.ndarray) -> list[int]:
    """(x0, y0, x1, y1) of a mask, a pixel wider where the image goes on."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    high = mask.shape[1] - 1, mask.shape[0] - 1
    low = [max(places[0] - 1, 0) for places in (columns, rows)]
    return low + [min(places[-1] + 1, n) for places, n in zip((columns, rows), high, strict=True)]
