"""LiteMedSAM with its own weights: the recorded outputs of the authors' model."""

import numpy as np
import pytest

import pgpsam_jax
from pgpsam_jax.models.sam.weights import MASK_TOKENS
from tests.support.places import shared, weights

pytestmark = pytest.mark.golden


def error(found, expected) -> float:
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def recorded():
    return np.load(shared("golden/lite_medsam.npz"))


@pytest.fixture(scope="module")
def predictor():
    return pgpsam_jax.SamPredictor.from_pretrained(weights("lite_medsam"))


def test_embedding_and_masks_are_the_recorded_ones(predictor, recorded, monkeypatch):
    """Measured on CPU: embeddings 2.9e-6, logits 3.0e-6, IoU 6e-7."""
    monkeypatch.setattr(predictor, "_mask_tokens", MASK_TOKENS)  # of which three give noise
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


def test_it_gives_the_mask_that_was_trained(predictor, recorded):
    predictor.set_image(recorded["images"][0])
    assert predictor.predict(box=recorded["boxes"][0]).scores.shape == (2, 1)


def test_another_size_with_the_same_weights(recorded):
    small = pgpsam_jax.SamPredictor.from_pretrained(weights("lite_medsam"), image_size=128)
    for image, expected in zip(recorded["images128"], recorded["embedding128"], strict=True):
        small.set_image(image)
        assert error(np.moveaxis(small.embedding, -1, 1), expected[None]) <= 1e-5
