"""SAM equals the recorded output of the official code, from the official checkpoint layout."""

import json
import runpy

import numpy as np
import pytest

from pgpsam_jax.models.sam.sam import SamConfig
from tests.reference import sam_torch
from tests.reference.sam_torch import encode, predict, relative
from tests.support.places import shared

pytestmark = pytest.mark.golden
WHOLE = 1e-5
KINDS = {
    "points": ("points", "labels"),
    "boxes": ("boxes",),
    "all": ("points", "labels", "boxes", "masks"),
    "none": (),
}


@pytest.fixture(scope="module")
def golden():
    """Recording of the official code, our model with the same weights, its embedding."""
    recording = np.load(shared("golden/sam_vit_b_1024.npz"))
    make = runpy.run_path(str(shared("golden/golden_weights.py")))
    shapes = json.loads(shared("golden/sam_vit_b_1024.json").read_text())["state_dict"]
    official = {name: make["tensor"](name, shape, 0) for name, shape in shapes.items()}
    sam = sam_torch.jax_sam(SamConfig.preset("vit_b", 1024), official)
    return recording, sam, encode(sam, np.moveaxis(make["image"](1, 1024, 0), 1, -1))


def test_golden_layout():
    """The names and shapes that the tests give torch weights by are the official ones."""
    expected = json.loads(shared("golden/sam_vit_b_1024.json").read_text())["state_dict"]
    model = sam_torch.empty_torch(SamConfig.preset("vit_b", 1024))
    names = {sam_torch.official_name(n): list(p.shape) for n, p in model.state_dict().items()}
    assert names == expected


def test_golden_embedding(golden):
    recording, _, embedding = golden
    assert relative(np.moveaxis(embedding, -1, 1), recording["embedding"]) <= WHOLE


@pytest.mark.parametrize("kind", KINDS)
def test_golden_masks(golden, kind):
    recording, sam, embedding = golden
    rng = np.random.default_rng([0, 9])
    rng.uniform(0, 1024, (2, 3, 2)), rng.uniform(0, 1024, (2, 2, 2))  # drawn before the mask
    prompts = {name: recording[name] for name in ("points", "labels", "boxes")}
    prompts["masks"] = rng.standard_normal((2, 256, 256, 1)).astype(np.float32)
    ours = predict(sam, embedding, {name: prompts[name] for name in KINDS[kind]})
    for multi, (logits, quality) in zip((1, 0), ours, strict=True):
        logits = np.moveaxis(logits, -1, 1)[:, :, ::2, ::2]
        name = f"{kind}.multi{multi}"
        assert relative(logits, recording[f"{name}.logits_stride2"]) <= WHOLE
        assert relative(quality, recording[f"{name}.iou"]) <= WHOLE
