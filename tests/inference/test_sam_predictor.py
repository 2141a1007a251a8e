"""`pgpsam_jax.SamPredictor` equals the official predictor: its steps on torch, the same weights.

The official code has no package here; `Official` is its documented steps written down, with
`transformers.SamModel` as the network. Bounds are relative L2 errors at float32.
"""

import json
import re
import runpy
import shutil

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import pgpsam_jax
from pgpsam_jax.errors import UserError
from pgpsam_jax.models.parameters import flat_paths
from pgpsam_jax.models.sam.image_encoder import PIXEL_MEAN, PIXEL_STD
from pgpsam_jax.models.sam.sam import Sam, SamConfig
from tests.reference import sam_torch
from tests.reference.sam_torch import SMALL, relative
from tests.support import micro
from tests.support.optional import F, torch
from tests.support.places import REPOSITORY, shared
from weights_conversion import sam

WHOLE = 1e-5
SHAPES = [(431, 517), (517, 431), (61, 40)]  # two that shrink, one that grows
POINTS = np.array([[0.31, 0.42], [0.77, 0.15], [0.5, 0.9]])  # share of width and height
BOXES = np.array([[0.1, 0.2, 0.6, 0.7], [0.3, 0.05, 0.99, 0.5]])
LABELS = np.array([1, 0, 1])


class Official:
    """SamPredictor of segment-anything, step by step: resize, normalize, pad, prompts, crop."""

    def __init__(self, model, size: int):
        self.model, self.size = model, size

    def set_image(self, image):
        h, w = self.original = image.shape[:2]
        scale = self.size * 1.0 / max(h, w)
        self.resized = int(h * scale + 0.5), int(w * scale + 0.5)
        image = Image.fromarray(image).resize(self.resized[::-1], Image.Resampling.BILINEAR)
        x = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None]
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        x = (x - mean) / std
        x = F.pad(x, (0, self.size - self.resized[1], 0, self.size - self.resized[0]))
        self.embedding = self.model.get_image_embeddings(x).detach()

    def predict(self, points, labels, boxes, masks, multimask):
        """One prompt; (M, h, w) logits, (M,) and (M, 4H, 4W)."""
        (h, w), (rows, columns), given = self.original, self.resized, {}
        scale = np.array([columns / w, rows / h])
        if points is not None:
            given["input_points"] = torch.tensor(points * scale).float()[None, None]
            given["input_labels"] = torch.tensor(labels)[None, None]
        if boxes is not None:
            scaled = (boxes.reshape(2, 2) * scale).reshape(4)
            given["input_boxes"] = torch.tensor(scaled).float()[None, None]
        if masks is not None:
            given["input_masks"] = torch.tensor(masks)[None, None]
        out = self.model(image_embeddings=self.embedding, multimask_output=multimask, **given)
        low = out.pred_masks[:, 0]
        full = F.interpolate(low, (self.size, self.size), mode="bilinear", align_corners=False)
        full = full[..., :rows, :columns]
        full = F.interpolate(full, (h, w), mode="bilinear", align_corners=False)
        return tuple(x.detach().numpy() for x in (full[0], out.iou_scores[0, 0], low[0]))


def picture(shape, seed=0):
    """A smooth uint8 color picture with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    smooth = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), float)
    return np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)


def prompts_of(shape, kind: str):
    """Points, labels, box and mask of one prompt, None where the kind has none of it."""
    size = np.array(shape[::-1])
    mask = np.random.default_rng(3).standard_normal((48, 48), np.float32)
    return dict(
        points=POINTS * size if "points" in kind else None,
        labels=LABELS if "points" in kind else None,
        box=(BOXES * np.tile(size, 2))[0] if "box" in kind else None,
        mask_input=mask if "mask" in kind else None,
    )


@pytest.fixture(scope="module")
def both():
    """Our predictor and the official steps, with the same weights."""
    _, theirs, ours = sam_torch.small()
    return pgpsam_jax.SamPredictor(ours), Official(theirs, SMALL.image_size[0])


# Multimask output by kind of prompt: each pair is a program to compile.
KINDS = {"points": True, "box": False, "mask": True, "points box mask": True, "": False}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_official_predictor(both, shape):
    ours, theirs = both
    image = picture(shape)
    ours.set_image(image)
    theirs.set_image(image)
    assert relative(np.moveaxis(ours.embedding, -1, 1), theirs.embedding) <= WHOLE
    for kind, multimask in KINDS.items():
        given = prompts_of(shape, kind)
        got = ours.predict(**given, multimask=multimask, return_logits=True)
        expected = theirs.predict(*given.values(), multimask)
        for own, other in zip(got, expected, strict=True):
            assert relative(own, other) <= WHOLE, kind
        assert got.masks.shape == (3 if multimask else 1, *shape)
    masks, _, _ = ours.predict(**given, multimask=multimask)
    assert masks.dtype == bool and np.array_equal(masks, got.masks > 0)


def test_batches_are_the_prompts_one_by_one(both):
    ours, shape = both[0], SHAPES[0]
    ours.set_image(picture(shape))
    size = np.array(shape[::-1])
    boxes, masks = BOXES * np.tile(size, 2), np.random.default_rng(4).normal(size=(2, 48, 48))
    batch = ours.predict(box=boxes, mask_input=masks, return_logits=True)
    assert [x.shape for x in batch] == [(2, 3, *shape), (2, 3), (2, 3, 48, 48)]
    for i in range(2):  # a batch of one, a mask with the axis that the official predictor asks for
        one = ours.predict(box=boxes[i : i + 1], mask_input=masks[i : i + 1], return_logits=True)
        assert all(relative(x[0], many[i]) <= WHOLE for x, many in zip(one, batch, strict=True))
        again = ours.predict(box=boxes[i], mask_input=masks[i : i + 1], return_logits=True)
        assert all(np.array_equal(x, y[0]) for x, y in zip(again, one, strict=True))
    assert ours._encode.func._cache_size() == 1
    assert ours._decode.func._cache_size() <= len(KINDS) + 2  # and the two of this test


def test_gray_and_float_images(both):
    """Gray is three equal channels; float images from 0 to 1 are the same picture, unrounded."""
    ours = both[0]
    gray = picture((80, 96))[..., 0]
    ours.set_image(np.repeat(gray[..., None], 3, -1))
    expected = ours.embedding
    ours.set_image(gray)
    assert np.array_equal(ours.embedding, expected)
    ours.set_image(gray / 255)  # float64, of the network's width already
    assert relative(ours.embedding, expected) <= WHOLE


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (np.zeros((4, 5, 4), np.uint8), r"\(4, 5, 4\); give \(h, w\)"),
        (np.zeros((0, 5), np.uint8), "shape"),
        (np.zeros((4, 5), np.int16), "type int16; give uint8"),
        (np.full((4, 5), 1.5), r"outside \[0, 1\]; rescale"),
        (np.full((4, 5), np.nan), "outside"),
    ],
)
def test_other_images_are_refused(both, image, fault):
    with pytest.raises(ValueError, match=fault):
        both[0].set_image(image)


@pytest.mark.parametrize(
    ("prompts", "fault"),
    [
        (dict(points=[[1, 2]]), "belong together"),
        (dict(points=[1, 2], labels=[1]), r"points has shape \(2,\); give \(P, 2\) or \(B, P, 2\)"),
        (dict(points=[[1, 2]], labels=[1, 0]), "one label per point"),
        (dict(points=[[1, 2]], labels=[2]), "1 .foreground., 0 .background. or -1"),
        (dict(points=[[97, 2]], labels=[1]), r"point \(97, 2\) lies outside the image of 96 x 80"),
        (dict(points=[[np.nan, 2]], labels=[1]), "outside"),
        (dict(box=[0, 0, 90, 81]), r"corner of a box \(90, 81\) lies outside"),
        (dict(box=[9, 0, 5, 8]), "x0 <= x1"),
        (dict(box=[1, 2, 3]), r"\(3,\); give \(4\) or \(B, 4\)"),
        (dict(box=np.zeros((2, 4)), points=[[1, 2]], labels=[1]), "differ in number"),
        (dict(mask_input=np.zeros((256, 256))), r"give \(48, 48\)"),
    ],
)
def test_other_prompts_are_refused(both, prompts, fault):
    both[0].set_image(picture((80, 96)))
    with pytest.raises(ValueError, match=fault):
        both[0].predict(**prompts)


def test_an_image_comes_first(both):
    with pytest.raises(ValueError, match="call set_image first"):
        pgpsam_jax.SamPredictor(sam_torch.small()[2]).predict(box=[0, 0, 5, 5])


def test_an_encoder_that_normalizes_is_refused():
    own = Sam(SamConfig.preset(micro.NAME, 32, 8, colors="normalized"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="build it with colors='unit'"):
        pgpsam_jax.SamPredictor(own)


@pytest.fixture(scope="module")
def stem(tmp_path_factory):
    """Converted weights of a random tiny SAM, for 64 px, whose encoder is `micro.NAME`."""
    model = Sam(SamConfig.preset(micro.NAME, 64, 8), rngs=nnx.Rngs(1))
    tensors = {p: np.asarray(x[...]) for p, x in flat_paths(nnx.state(model)).items()}
    stem = tmp_path_factory.mktemp("weights") / "sam_micro"
    sam.store(stem, tensors, {})
    return stem


def test_from_pretrained(stem):
    image, box = picture((50, 40)), [5, 5, 30, 40]
    config = SamConfig.preset(micro.NAME, 64, 8)
    memory = pgpsam_jax.SamPredictor(Sam(config, rngs=nnx.Rngs(1)))
    for path in (stem, f"{stem}.safetensors"):
        loaded = pgpsam_jax.SamPredictor.from_pretrained(path, micro.NAME)
    for predictor in (memory, loaded):
        predictor.set_image(image)
    for own, other in zip(loaded.predict(box=box), memory.predict(box=box), strict=True):
        assert np.array_equal(own, other)
    smaller = pgpsam_jax.SamPredictor.from_pretrained(stem, micro.NAME, image_size=32)
    smaller.set_image(image)
    assert smaller.embedding.shape == (1, 4, 4, 32)


def test_masks_that_were_not_trained_are_not_given(stem):
    sidecar = stem.with_name("sam_lite.json")
    meta = json.loads(stem.with_name("sam_micro.json").read_text())
    shutil.copy(f"{stem}.safetensors", sidecar.with_suffix(".safetensors"))
    sidecar.write_text(json.dumps(meta | {"mask_tokens": [0], "colors": "unit"}))
    one = pgpsam_jax.SamPredictor.from_pretrained(sidecar, micro.NAME)
    one.set_image(picture((50, 40)))
    assert len(one.predict().scores) == len(one.predict(multimask=False).scores) == 1
    with pytest.raises(ValueError, match=r"needs mask token 1 to 3, but .* 0 was trained; set"):
        one.predict(multimask=True)
    sidecar.write_text(json.dumps(meta | {"variant": "tiny_vit"}))
    with pytest.raises(UserError, match="has the encoder tiny_vit, not vit_micro; leave it out"):
        pgpsam_jax.SamPredictor.from_pretrained(sidecar, micro.NAME)


def test_wrong_files_are_said(stem):
    load = pgpsam_jax.SamPredictor.from_pretrained
    with pytest.raises(UserError, match="do not fit the model"):
        load(stem, "vit_t")
    with pytest.raises(UserError, match="unknown SAM encoder 'vit_x'"):
        load(stem, "vit_x")
    with pytest.raises(UserError, match="does not exist; download"):
        load("nowhere/sam_vit_b")
    with pytest.raises(UserError, match=r"not converted; run .* --output w/sam_vit_b and"):
        load("w/sam_vit_b.pth")


def test_the_page_runs(stem, tmp_path, monkeypatch, capsys):
    """The code of docs/sam.md, with the tiny SAM in the place of vit_b."""
    page = (REPOSITORY / "docs" / "sam.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 40
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    assert '"sam_vit_b"' in code
    code = code.replace('"sam_vit_b"', f'{str(stem)!r}, "{micro.NAME}"')
    Image.fromarray(picture((90, 120))).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/sam.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.golden
def test_low_resolution_logits_are_the_recorded_ones():
    """Batched prompts through the predictor, on the embedding that the official code made."""
    recording = np.load(shared("golden/sam_vit_b_1024.npz"))
    make = runpy.run_path(str(shared("golden/golden_weights.py")))
    shapes = json.loads(shared("golden/sam_vit_b_1024.json").read_text())["state_dict"]
    official = {name: make["tensor"](name, shape, 0) for name, shape in shapes.items()}
    model = sam_torch.jax_sam(SamConfig.preset("vit_b", 1024), official)
    predictor = pgpsam_jax.SamPredictor(model)
    predictor._embedding = np.moveaxis(recording["embedding"], 1, -1)
    predictor._original = predictor._resized = (1024, 1024)
    prompts = {"points": ("points", "labels"), "boxes": ("box",)}
    named = {"points": "points", "labels": "labels", "box": "boxes"}
    for kind, names in prompts.items():
        result = predictor.predict(**{name: recording[named[name]] for name in names})
        assert relative(result.scores, recording[f"{kind}.multi1.iou"]) <= WHOLE
        recorded = recording[f"{kind}.multi1.logits_stride2"]
        assert relative(result.low_res_logits[..., ::2, ::2], recorded) <= WHOLE
